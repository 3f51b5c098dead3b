"""`sft check`: what a dataset would become, without training and without model weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.rejected import describe_place, judge_rejected
from schemas.config import DataConfig, ModelConfig, TokenizationConfig
from tasks import storage
from tasks.base_model import limit_length
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.quality_page import write_quality_page
from tasks.ingestion.reject_groups import group_rejects
from tasks.registry.bases import find_tokenizer_folder
from tasks.registry.sources import bring_sources
from tasks.tokenization.examples import PARTS, TokenizationError, tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer


@dataclass(frozen=True)
class Check:
    """What the checks found."""

    problems: tuple[str, ...]
    """Broken budgets; empty means that a run would start training."""
    rows: dict[str, int]
    """Where every row went; the values behind the first add up to it."""
    rejected: dict[str, int]
    """Rows by reason."""
    places: dict[str, list[str]]
    """The first places and details of each reason."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    """What was chosen for the tokenizer."""
    masks: dict[str, Any]
    """The training part's mask report; see masks.json."""
    max_length: int
    """Tokens at which examples are cut: tokenization.max_length, or the model's positions where they are fewer."""

    def to_json(self) -> str:
        """Return the check as a JSON object, with `ok` first."""
        values = {"ok": not self.problems, **vars(self)}
        return json.dumps(values, ensure_ascii=False, indent=2, default=list) + "\n"


def check_dataset(
    data: DataConfig, model: ModelConfig, tokenization: TokenizationConfig, *, seed: int, page: Path | None = None
) -> Check:
    """Ingest and tokenize a dataset as a run would, with the budgets judged at the end.

    Args:
        data: the dataset.
        model: whose tokenizer is taken.
        tokenization: masks and limits.
        seed: of the split.
        page: where the page for people is written; its folder is made where it is missing.

    Raises:
        ValueError: the dataset cannot be read at all, or nothing of it can be trained.
    """
    problems: list[str] = []
    with storage.new_folder() as folder:
        # The budget for rejected rows is judged below, over both stages, so that all of it is seen at once.
        generous = bring_sources(data).model_copy(update={"max_rejected_fraction": 1.0})
        counts = build_dataset(generous, seed=seed, folder=folder / "dataset")
        place = find_tokenizer_folder(model)
        prepared = prepare_tokenizer(place, model.chat_template, tokenization.template_arguments)
        limited, told = limit_length(tokenization, place, model.base_model)
        try:
            warnings = tokenize_dataset(folder / "dataset", prepared, folder / "tokens", limited).warnings
        except TokenizationError as error:  # a budget: what was made is there, and is shown
            problems.append(str(error))
            warnings = ()
        tables = [folder / part / "rejects.parquet" for part in ("dataset", "tokens")]
        groups = group_rejects(tables)
        quality = json.loads((folder / "dataset" / "quality.json").read_text(encoding="utf-8"))
        masks = json.loads((folder / "tokens" / "masks.json").read_text(encoding="utf-8"))
        rejected = {group.reason: group.count for group in groups}
        num_rows = max(counts.rows_in, counts.rows_read)
        if problem := judge_rejected(rejected, num_rows, data.max_rejected_fraction, groups):
            problems.insert(0, problem)
        warnings = (*([told] if told else []), *warnings)
        if page is not None:
            title = f"Check of {data.source}"
            written = write_quality_page(
                folder / "page", quality, tables, masks, title=title, warnings=warnings, problems=problems
            )
            page.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(written, page)
    lost = {part: sum(masks[part]["rejected"].values()) for part in PARTS}
    return Check(
        problems=tuple(problems),
        rows={
            "rows in": counts.rows_in,
            "to train": counts.rows_train - lost["train"],
            "held out": counts.rows_eval - lost["eval"],
            "duplicates": counts.rows_duplicate,
            "leaked": counts.rows_leaked,
            "rejected": sum(rejected.values()),
        },
        rejected=rejected,
        places={group.reason: [describe_place(row) for row in group.rows] for group in groups},
        warnings=(*quality["warnings"], *warnings),
        notes=prepared.notes,
        masks=masks["train"],
        max_length=masks["max_length"],
    )
