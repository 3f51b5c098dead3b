"""One model on the held-out examples: an answer, a likelihood and measures for every row."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandera.polars as pa
import polars as pl
from transformers import PreTrainedTokenizerBase

from schemas.config import EvaluationConfig
from schemas.records import EvaluationRows, PairRows, columns_of
from tasks.evaluation.answering import Answer, Asked, Terms, answering, collect_ends
from tasks.evaluation.generation import decode, read_limit, render_questions
from tasks.evaluation.metrics import METRICS, ScoredAnswer, average_rows, measured_columns
from tasks.evaluation.preferences import Runs, find_runs
from tasks.families.classes import FamilyError, read_config
from tasks.models import load_tokenizer
from tasks.prompts import load_settings
from tasks.tokenization.labels import IGNORE_INDEX

logger = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """The held-out examples cannot be evaluated with this model."""


@dataclass(frozen=True)
class HeldOut:
    """A held-out example, cut into what the model is given and what it should say."""

    example_id: str
    question: str
    reference: str
    prompt: list[int]
    target: list[int]
    pair: "tuple[Side, Side] | None" = None
    """The chosen and the rejected answer, where the example is a pair."""


class Side(NamedTuple):
    """One answer of a pair, all its turns."""

    input_ids: list[int]
    runs: Runs
    """Where its trained tokens are."""


def evaluate_model(
    model_folder: Path,
    tokens: Path,
    config: EvaluationConfig,
    on_progress: Callable[[int, int], None] = lambda num_done, num_all: None,
    *,
    precision: str = "auto",
) -> tuple[pl.DataFrame, dict[str, float], list[tuple[str, str]]]:
    """Evaluate the model of a folder on the held-out examples of a tokens folder.

    Args:
        model_folder: config.json and safetensors weights.
        tokens: eval.parquet and tokenizer/; the same for the models that are to be compared.
        config: how many rows, how long the answers, the free questions.
        on_progress: called with the units of work done and all of them (a row counts once for its answer and once
            for its likelihood).
        precision: auto, bf16 or fp32; auto is fp32 on a CPU.

    Returns:
        The rows (EvaluationRows) in the order of the file, the metrics over them (none without rows), and (question,
        answer) for each free question.

    Raises:
        EvaluationError: a held-out example without a prompt, one longer than the model's context, or a
            likelihood that is not a finite number.
    """
    found = evaluate_sets(model_folder, tokens, config, on_progress, precision=precision)
    return found.rows, average_rows(found.rows), found.answers


@dataclass(frozen=True)
class Evaluation:
    """What a model made of the held-out rows, of the free questions, and of further sets."""

    rows: pl.DataFrame
    """EvaluationRows, in the order of the file."""
    answers: list[tuple[str, str]]
    """(question, answer) of each free question."""
    probes: dict[str, pl.DataFrame]
    """EvaluationRows of each further set."""


def evaluate_sets(
    model_folder: Path,
    tokens: Path,
    config: EvaluationConfig,
    on_progress: Callable[[int, int], None] = lambda num_done, num_all: None,
    *,
    precision: str = "auto",
    probes: Mapping[str, Path] | None = None,
) -> Evaluation:
    """Evaluate a model on the held-out examples and on further sets, loading it once.

    Args:
        model_folder: as in `evaluate_model`, like the next three and `precision`, and the errors.
        tokens: see there.
        config: see there.
        on_progress: see there; the sets count too.
        precision: see there.
        probes: name of each further set to its examples.
    """
    tokenizer = load_tokenizer(tokens / "tokenizer")
    held_out = read_held_out(tokens, config.max_examples)
    sets = {name: read_examples(file, None) for name, file in (probes or {}).items()}
    everything = [example for examples in (held_out, *sets.values()) for example in examples]
    settings = load_settings(tokens / "tokenizer", tokenizer)
    questions = render_questions(config.questions, tokenizer, settings, system=config.system_message)
    if not everything and not questions:  # there is nothing to ask
        return Evaluation(rows=score_rows([], [], [], tokenizer), answers=[], probes={})
    _check_context(model_folder, everything)
    rejected = (side.input_ids for example in everything for side in example.pair or ())
    ids = (*(row for example in everything for row in (example.prompt, example.target)), *rejected)
    terms = Terms(
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        precision=precision,
        num_ids=1 + max(max(row) for row in (*ids, *questions)),
    )
    num_done, num_all = 0, 2 * len(everything) + len(questions)

    def advance(num_rows: int) -> None:
        nonlocal num_done
        num_done += num_rows
        on_progress(num_done, num_all)

    with answering(
        model_folder,
        tokens / "tokenizer",
        terms,
        num_processes=config.num_processes,
        num_rows=len(everything),
        advance=advance,
    ) as answer:

        def answer_set(examples: list[HeldOut], further: list[list[int]]) -> tuple[pl.DataFrame, list[list[int]]]:
            prompts, targets = [example.prompt for example in examples], [example.target for example in examples]
            # Free questions go with the rows: a batch of their own would cost as much as a full one.
            answers, nll_sums = answer(Asked(prompts + further, targets, collect_ends(targets)))
            rows = score_rows(examples, answers[: len(examples)], nll_sums, tokenizer)
            if any(example.pair is not None for example in examples):
                rows = rows.hstack(_score_pairs(answer, examples))
            return rows, answers[len(examples) :]

        rows, free = answer_set(held_out, questions)
        return Evaluation(
            rows=rows,
            answers=[(q, decode(tokenizer, ids)) for q, ids in zip(config.questions, free, strict=True)],
            probes={name: answer_set(examples, [])[0] for name, examples in sets.items()},
        )


def _score_pairs(answer: Answer, examples: Sequence[HeldOut]) -> pl.DataFrame:
    """Return the likelihoods of both answers of each pair (PairRows).

    Raises:
        EvaluationError: one is not a finite number.
    """
    sides = [side for example in examples if example.pair is not None for side in example.pair]
    assert len(sides) == 2 * len(examples), "a part of the held-out rows are pairs"
    runs = [(side.input_ids, start, end) for side in sides for start, end in side.runs]
    prompts, targets = [ids[:start] for ids, start, _ in runs], [ids[start:end] for ids, start, end in runs]
    found = iter(answer(Asked(prompts, targets, [], is_answered=False))[1])
    sums = [math.fsum(next(found) for _ in side.runs) for side in sides]
    tokens = [sum(end - start for start, end in side.runs) for side in sides]
    for number, nll_sum in enumerate(sums):
        _check_finite(examples[number // 2].example_id, nll_sum)
    columns = {"chosen_nll": sums[::2], "chosen_tokens": tokens[::2]}
    return PairRows.validate(
        pl.DataFrame(columns | {"rejected_nll": sums[1::2], "rejected_tokens": tokens[1::2]}, columns_of(PairRows))
    )


def _check_finite(example_id: str, nll_sum: float) -> None:
    if not math.isfinite(nll_sum):
        raise EvaluationError(
            f"example_id {example_id}: the model gives a likelihood of {nll_sum}, a finite number is "
            "wanted: its weights hold NaN or overflow; train again with a lower learning rate or in fp32"
        )


def read_held_out(tokens: Path, max_examples: int | None) -> list[HeldOut]:
    """Read the first held-out examples of a tokens folder; none where nothing was held out."""
    file = tokens / "eval.parquet"
    return read_examples(file, max_examples) if count_rows(file) else []


def count_rows(file: Path) -> int:
    """Return how many rows a Parquet file has."""
    return int(pl.scan_parquet(file).select(pl.len()).collect().item())


def read_examples(file: Path, max_examples: int | None) -> list[HeldOut]:
    """Read the first held-out examples and cut each where its last run of labels begins.

    Raises:
        EvaluationError: no example, or one without a label or without a prompt.
    """
    frame = pl.read_parquet(file, n_rows=max_examples)
    if frame.is_empty():
        raise EvaluationError(
            f"{file}: no held-out example to evaluate: raise data.eval_fraction or set data.eval_source"
        )
    examples = []
    for row in frame.iter_rows(named=True):
        span = find_last_run(row["labels"])
        if span is None or span[0] == 0:
            lack = "no token with a label" if span is None else "nothing before its answer"
            raise EvaluationError(
                f"{file}: example_id {row['example_id']} has {lack}: a held-out example needs a prompt that is not "
                "trained on (tokenization.train_on_prompt off) and an answer"
            )
        start, end = span
        examples.append(
            HeldOut(
                example_id=row["example_id"],
                question=row["question"],
                reference=row["reference"],
                prompt=row["input_ids"][:start],
                target=row["input_ids"][start:end],
                pair=_read_pair(row),
            )
        )
    return examples


def _read_pair(row: dict[str, Any]) -> tuple[Side, Side] | None:
    """Return both answers of a row of examples; None where it is no pair."""
    if row.get("rejected_ids") is None:
        return None
    chosen, rejected = (
        Side(row[ids], find_runs(row[labels]))
        for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))
    )
    return chosen, rejected


def find_last_run(labels: Sequence[int]) -> tuple[int, int] | None:
    """Return start and end of the last unbroken run of labels other than -100; None without any."""
    end = len(labels)
    while end > 0 and labels[end - 1] == IGNORE_INDEX:
        end -= 1
    start = end
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (start, end) if end > 0 else None


def score_rows(
    examples: Sequence[HeldOut],
    answers: Sequence[Sequence[int]],
    nll_sums: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> pl.DataFrame:
    """Measure each answer and return the validated table.

    Raises:
        EvaluationError: a likelihood is not a finite number.
    """
    rows = []
    for example, answer, nll_sum in zip(examples, answers, nll_sums, strict=True):
        _check_finite(example.example_id, nll_sum)
        scored = ScoredAnswer(decode(tokenizer, answer), example.reference, answer, nll_sum, len(example.target))
        rows.append(
            {
                "example_id": example.example_id,
                "question": example.question,
                "reference": example.reference,
                "answer": scored.answer,
                "nll_sum": nll_sum,
                "num_tokens": scored.num_tokens,
                **{column: _measure(name, scored) for column, name in measured_columns().items()},
            }
        )
    return validate_rows(pl.DataFrame(rows, schema=_schema()))


def _measure(name: str, scored: ScoredAnswer) -> float:
    measure = METRICS[name].measure
    assert measure is not None
    return float(measure(scored))


def validate_rows(rows: pl.DataFrame) -> pl.DataFrame:
    """Check the rows of an evaluation: the columns that all have, and one for each metric within its bounds."""
    bounds = {column: METRICS[name].bounds for column, name in measured_columns().items() if column != "nll_sum"}
    measured = {
        column: pa.Column(float, pa.Check.in_range(low, high, include_min=True, include_max=True))
        for column, (low, high) in bounds.items()
    }
    return EvaluationRows.to_schema().add_columns(measured).validate(rows)


def _schema() -> dict[str, Any]:
    """Return the columns of an evaluation's rows."""
    return columns_of(EvaluationRows) | dict.fromkeys(
        (name for name in measured_columns() if name != "nll_sum"), pl.Float64
    )


def _check_context(model: Path, examples: Sequence[HeldOut]) -> None:
    """Refuse an example that does not fit into the model's context."""
    if not examples:
        return
    longest = max(examples, key=lambda example: len(example.prompt) + len(example.target))
    try:
        limit = read_limit(read_config(model))
    except FamilyError:  # which loading the model says better
        return
    num_tokens = len(longest.prompt) + len(longest.target)
    if num_tokens > limit:
        raise EvaluationError(
            f"example_id {longest.example_id} has {num_tokens} tokens, but the model's context is {limit} "
            f"(max_position_embeddings): set tokenization.max_length to at most {limit}"
        )
