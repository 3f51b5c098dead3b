"""`sft check`: what a dataset would become, without training and without model weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.config import DataConfig, ModelConfig, TokenizationConfig
from tasks import storage
from tasks.base_model import locate_tokenizer
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.reject_groups import group_rejects
from tasks.registry.publication import bring_sources
from tasks.tokenization.examples import tokenize_dataset
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

    def to_json(self) -> str:
        """Return the check as a JSON object, with `ok` first."""
        values = {"ok": not self.problems, **vars(self)}
        return json.dumps(values, ensure_ascii=False, indent=2, default=list) + "\n"


def check_dataset(data: DataConfig, model: ModelConfig, tokenization: TokenizationConfig, *, seed: int) -> Check:
    """Ingest and tokenize a dataset as a run would, with the budgets judged at the end.

    Raises:
        ValueError: the dataset cannot be read at all, or nothing of it can be trained.
    """
    with storage.new_folder() as folder:
        generous = bring_sources(data).model_copy(update={"max_rejected_fraction": 1.0})
        counts = build_dataset(generous, seed=seed, folder=folder / "dataset")
        prepared = prepare_tokenizer(locate_tokenizer(model), model.chat_template)
        patient = tokenization.model_copy(update={"max_truncated_fraction": 1.0})
        tokens = tokenize_dataset(folder / "dataset", prepared, folder / "tokens", patient)
        rejects = group_rejects(folder / part / "rejects.parquet" for part in ("dataset", "tokens"))
        quality = json.loads((folder / "dataset" / "quality.json").read_text(encoding="utf-8"))
        masks = json.loads((folder / "tokens" / "masks.json").read_text(encoding="utf-8"))["train"]
    return Check(
        problems=tuple(_find_problems(data, tokenization, counts.rows_read, sum(counts.rows_rejected.values()), masks)),
        rows={
            "rows in": counts.rows_in,
            "to train": tokens.rows_train,
            "held out": tokens.rows_eval,
            "duplicates": counts.rows_duplicate,
            "leaked": counts.rows_leaked,
            "rejected": sum(group.count for group in rejects),
        },
        rejected={group.reason: group.count for group in rejects},
        places={group.reason: [_describe_place(row) for row in group.rows] for group in rejects},
        warnings=(*quality["warnings"], *tokens.warnings),
        notes=prepared.notes,
        masks=masks,
    )


def _find_problems(
    data: DataConfig, tokenization: TokenizationConfig, num_rows: int, num_rejected: int, masks: dict[str, Any]
) -> list[str]:
    """Return the broken budgets, each with value, limit and setting."""
    problems = []
    if num_rejected > data.max_rejected_fraction * num_rows:
        problems.append(
            f"{num_rejected:,} of {num_rows:,} rows ({num_rejected / num_rows:.2%}) are rejected, and "
            f"data.max_rejected_fraction is {data.max_rejected_fraction:.2%}: mend the rows or raise the budget"
        )
    for_length = masks["num_truncated"] + masks["num_too_long"]
    num_examples = masks["num_examples"] + masks["num_too_long"]
    if for_length > tokenization.max_truncated_fraction * num_examples:
        problems.append(
            f"{for_length:,} of {num_examples:,} examples ({for_length / num_examples:.2%}) are cut or too long, and "
            f"tokenization.max_truncated_fraction is {tokenization.max_truncated_fraction:.2%}: raise "
            f"tokenization.max_length ({tokenization.max_length}) or the budget"
        )
    return problems


def _describe_place(row: dict[str, Any]) -> str:
    return f"{Path(row['source']).name}:{row['line']}  {row['detail']}"
