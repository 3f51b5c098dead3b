"""`sft evaluate`: a model on the rows of a dataset, beside its base, without a run."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import BaseModel

from flows.targets import Target
from schemas.artifacts import Delta
from schemas.config import RunConfig
from schemas.plurals import count_of
from tasks import storage, tracking
from tasks.base_model import limit_length
from tasks.evaluation.comparison import compare
from tasks.evaluation.conversations import find_conversations
from tasks.evaluation.metrics import average_rows
from tasks.evaluation.scoring import Evaluation, evaluate_sets
from tasks.ingestion.dataset import build_dataset
from tasks.partitions import copy_table
from tasks.registry.sources import bring_sources
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer


@dataclass(frozen=True)
class Evaluated:
    """What was measured, and where every row went."""

    target: str
    base: str
    """Empty where nothing was compared."""
    rows: dict[str, int]
    """rows in = evaluated + not asked (beyond evaluation.max_examples) + duplicates + rejected by each reason."""
    metrics: dict[str, float]
    base_metrics: dict[str, float]
    delta: dict[str, Delta]
    table: pl.DataFrame
    """EvaluationRows of the model, with the base's answers where it was compared."""
    notes: tuple[str, ...]
    num_trained_on: int | None
    """Of the evaluated rows, those that the version was trained on; None where that is not known."""

    @property
    def warning(self) -> str:
        """What a reader of the metrics has to know; empty for nothing."""
        if not self.num_trained_on:
            return ""
        part = f"{self.num_trained_on:,} of {count_of(self.rows['evaluated'], 'row')}"
        return f"{self.target} was trained on {part}: what is measured there says little of rows that are new to it"

    def write_json(self, path: Path) -> None:
        """Write all but the table as a JSON object."""
        values = {name: value for name, value in vars(self).items() if name != "table"}
        path.write_text(json.dumps(values, ensure_ascii=False, indent=2, default=_dump) + "\n", encoding="utf-8")

    def write_answers(self, path: Path) -> None:
        """Write the table as Parquet."""
        self.table.write_parquet(path)


def evaluate_target(
    target: Target,
    config: RunConfig,
    *,
    with_base: bool,
    on_progress: Callable[[str], Callable[[int, int], None]] = lambda who: lambda num_done, num_all: None,
) -> Evaluated:
    """Ask a model, and its base, all rows of a dataset, with the tokenizer and template of the model.

    Args:
        target: opened.
        config: data, tokenization and evaluation; none of the rows is held back.
        with_base: compare with the base.
        on_progress: given who answers, called with the units of work done and all of them.

    Raises:
        ValueError: no row can be asked, or a model cannot answer.
    """
    with storage.new_folder() as folder:
        rows, notes = _prepare(target, config, folder)

        def answer(model: Path, who: str) -> Evaluation:
            return evaluate_sets(model, folder / "tokens", config.evaluation, on_progress(who))

        found = answer(target.folder, target.label)
        base = answer(target.base, target.base_label) if with_base and target.base is not None else None
        conversations = find_conversations(folder / "dataset" / "eval.parquet")
    num_asked = found.rows["example_id"].n_unique()
    rows |= {"evaluated": num_asked, "not asked": rows["not asked"] - num_asked}
    if rows["not asked"]:
        most = f"evaluation.max_examples = {config.evaluation.max_examples}"
        notes = (*notes, f"{count_of(rows['not asked'], 'row is', 'rows are')} not asked: {most}, which --set changes")
    metrics = average_rows(found.rows)
    num_known, told = _count_known(target, found.rows)
    notes = (*notes, *told)
    if base is None:
        return Evaluated(target.label, "", rows, metrics, {}, {}, found.rows, notes, num_known)
    compared = compare(base.rows, found.rows, config.evaluation, seed=config.seed, conversations=conversations)
    table = found.rows.with_columns(base.rows["answer"].alias("answer_base"))
    return Evaluated(
        target.label, target.base_label, rows, metrics, compared.before, compared.delta, table, notes, num_known
    )


def _count_known(target: Target, rows: pl.DataFrame) -> tuple[int | None, tuple[str, ...]]:
    """Return how many of the rows a version was trained on, and why that is not known where it is not."""
    if target.dataset is None:
        return None, ()
    asked, known = set(rows["example_id"]), set()
    try:
        for part in tracking.read_parts(target.dataset, "train.parquet"):
            known |= asked.intersection(pl.read_parquet(part, columns=["example_id"])["example_id"])
    except tracking.ArtifactError as error:
        return None, (f"its training rows are gone, so that some of these may be among them ({error})",)
    return len(known), ()


def _prepare(target: Target, config: RunConfig, folder: Path) -> tuple[dict[str, int], tuple[str, ...]]:
    """Make examples of all rows; return where they went, `not asked` being all that could be, and notes."""
    data = bring_sources(config.read_data.model_copy(update={"eval_fraction": 0.0, "eval_source": None}))
    counts = build_dataset(data, seed=config.seed, folder=folder / "dataset")
    # As held-out rows are made: the last answer of each conversation is asked for.
    copy_table(folder / "dataset" / "train.parquet", folder / "dataset" / "eval.parquet")
    prepared = prepare_tokenizer(target.folder, config.model.chat_template, config.tokenization.template_arguments)
    limited, told = limit_length(config.tokenization, target.folder, target.label)
    made = tokenize_dataset(folder / "dataset", prepared, folder / "tokens", limited)
    lost = json.loads((folder / "tokens" / "masks.json").read_text(encoding="utf-8"))["eval"]["rejected"]
    rejected = Counter(counts.rows_rejected) + Counter(lost)
    rows = {"rows in": counts.rows_in, "evaluated": 0, "not asked": made.rows_eval, "duplicates": counts.rows_duplicate}
    return {**rows, **{f"rejected: {reason}": number for reason, number in rejected.items()}}, (
        *prepared.notes,
        *([told] if told else []),
    )


def _dump(value: Any) -> Any:
    assert isinstance(value, BaseModel)
    return value.model_dump()
