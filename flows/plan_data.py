"""What a run will find: kept results of its first stages, and examples, made as the run would make them."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.accounting import account_rows, name_warnings
from flows.probing import digest_template
from flows.rejected import judge_rejected
from schemas.artifacts import DatasetRef, DatasetReport, EvalReport, ModelRef, TokensRef
from schemas.config import RunConfig
from tasks import tracking
from tasks.base_model import limit_length
from tasks.caching import read_kept
from tasks.evaluation.task import evaluate
from tasks.ingestion.counts import DatasetCounts
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.task import find_source, ingest
from tasks.partitions import copy_table
from tasks.planning.sizes import Sizes, count_rows, draw_conversations, measure_sizes
from tasks.probing.task import digest_probes, prepare_probes
from tasks.registry.sources import bring_sources
from tasks.tokenization.examples import PARTS, TokenizationError, tokenize_dataset
from tasks.tokenization.task import tokenize
from tasks.tokenization.templates import prepare_tokenizer


@dataclass(frozen=True)
class Kept:
    """Results of earlier runs that this machine has, and a run of the config would take."""

    dataset: DatasetRef | None = None
    tokens: TokensRef | None = None
    base_evaluation: EvalReport | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that would be found in the cache."""
        found = {"ingest": self.dataset, "tokenize": self.tokens, "evaluate base": self.base_evaluation}
        return tuple(name for name, ref in found.items() if ref is not None)


@dataclass(frozen=True)
class Found:
    """Rows, examples and their sizes."""

    rows: dict[str, int]
    """rows in, and where each goes; of a part that was drawn, the rows lost in tokenization are not among them."""
    rows_read: int
    num_eval_examples: int
    sizes: Sizes
    tokens: Path
    """Folder of examples, for as long as the caller keeps it."""
    problems: tuple[str, ...]
    """What the run would refuse."""
    warnings: tuple[str, ...]
    share: float = 1.0
    """Part of all conversations that was tokenized."""


@dataclass(frozen=True)
class Ingested:
    """Conversations, and where the rows went."""

    folder: Path
    rows: dict[str, int]
    rows_read: int
    rejected: Mapping[str, int]


def find_kept(config: RunConfig, base_model: ModelRef) -> Kept:
    """Look for what this machine has kept of the stages before the training, by the keys that the run would use."""
    template = config.model.chat_template
    source = find_source(config.read_data)
    dataset = read_kept(ingest, source=source, config=config.read_data, seed=config.seed)
    if dataset is None:
        return Kept()
    common: dict[str, Any] = {"chat_template": template, "template_file_digest": digest_template(template)}
    tokens = read_kept(tokenize, dataset=dataset, base_model=base_model, config=config.tokenization, **common)
    if tokens is None:
        return Kept(dataset)
    probes = None
    if wanted := config.evaluation.probes:
        probes = read_kept(
            prepare_probes,
            probes=wanted,
            source_digests=digest_probes(wanted),
            base_model=base_model,
            dataset=dataset,
            config=config.tokenization,
            seed=config.seed,
            **common,
        )
        if probes is None:
            return Kept(dataset, tokens)
    asked = {"model": base_model, "tokens": tokens, "config": config.evaluation, "probes": probes}
    return Kept(dataset, tokens, read_kept(evaluate, **asked))


def find_data(config: RunConfig, model_folder: Path, kept: Kept, place: Path, *, most: int) -> Found:
    """Count rows and examples: of kept results, or made anew.

    Args:
        config: of the run.
        model_folder: with the tokenizer.
        kept: of earlier runs.
        place: folder for what is made; the caller deletes it.
        most: conversations that are tokenized; of more, so many are drawn.

    Raises:
        ValueError: the dataset cannot be read, or nothing of it can be trained.
    """
    if kept.dataset is not None and kept.tokens is not None:
        return _take(config, kept.dataset, kept.tokens)
    if kept.dataset is not None:
        folder, rows, rejected = tracking.resolve(kept.dataset), _count_rows(kept.dataset), kept.dataset.rows_rejected
        return _make(config, model_folder, Ingested(folder, rows, kept.dataset.rows_read, rejected), place, most=most)
    # The budget for rejected rows is judged later, over both stages.
    generous = bring_sources(config.read_data).model_copy(update={"max_rejected_fraction": 1.0})
    counts = build_dataset(generous, seed=config.seed, folder=place / "dataset")
    made = Ingested(place / "dataset", _count_rows(counts), counts.rows_read, counts.rows_rejected)
    return _make(config, model_folder, made, place, most=most)


def _take(config: RunConfig, dataset: DatasetRef, tokens: TokensRef) -> Found:
    """Count what both stages have kept; it was within the budgets."""
    rows = _count_rows(account_rows(dataset, tokens))
    folder = tracking.resolve(tokens)
    sizes = measure_sizes(folder / "train.parquet", config.training)
    warnings = name_warnings(dataset, tokens)
    return Found(rows, dataset.rows_read, tokens.num_eval_examples, sizes, folder, (), warnings)


def _count_rows(counts: DatasetRef | DatasetReport | DatasetCounts) -> dict[str, int]:
    return {
        "rows in": counts.rows_in,
        "to train": counts.rows_train,
        "held out": counts.rows_eval,
        "duplicates": counts.rows_duplicate,
        "leaked": counts.rows_leaked,
        "rejected": sum(counts.rows_rejected.values()),
    }


def _make(config: RunConfig, model_folder: Path, ingested: Ingested, place: Path, *, most: int) -> Found:
    """Tokenize a dataset, or a part of it, and count."""
    drawn, dataset = place / "drawn", ingested.folder
    drawn.mkdir()
    total = draw_conversations(dataset / "train.parquet", drawn, number=most, seed=config.seed)
    is_part = total > most
    if is_part:
        copy_table(dataset / "eval.parquet", drawn / "eval.parquet")
        dataset = drawn
    tokens, problems, warnings = _tokenize(config, model_folder, dataset, place)
    masks = json.loads((tokens / "masks.json").read_text(encoding="utf-8"))
    lost = {part: Counter(masks[part]["rejected"]) for part in PARTS}
    rows, rejected = ingested.rows, ingested.rejected
    if is_part:
        if number := lost["train"].total():
            warnings.append(f"{number:,} of the {most:,} conversations drawn become no example: sft check names them")
    else:
        rejected = Counter(rejected) + lost["train"] + lost["eval"]
        rows = {
            **rows,
            "to train": rows["to train"] - lost["train"].total(),
            "held out": rows["held out"] - lost["eval"].total(),
            "rejected": sum(rejected.values()),
        }
    num_rows = max(rows["rows in"], ingested.rows_read)
    if problem := judge_rejected(rejected, num_rows, config.data.max_rejected_fraction, ()):
        problems.append(problem)
    share = most / total if is_part else 1.0
    sizes = measure_sizes(tokens / "train.parquet", config.training, share=share, num_sampled=most if is_part else None)
    num_eval = count_rows(tokens / "eval.parquet")
    return Found(rows, ingested.rows_read, num_eval, sizes, tokens, tuple(problems), tuple(warnings), share)


def _tokenize(config: RunConfig, model_folder: Path, dataset: Path, place: Path) -> tuple[Path, list[str], list[str]]:
    """Make examples; return their folder, what a run would refuse, and warnings.

    Raises:
        TokenizationError: there is no example to train.
    """
    prepared = prepare_tokenizer(model_folder, config.model.chat_template, config.tokenization.template_arguments)
    limited, told = limit_length(config.tokenization, model_folder, config.model.base_model)
    tokens, warnings = place / "tokens", [told] if told else []
    try:
        warnings += tokenize_dataset(dataset, prepared, tokens, limited).warnings
    except TokenizationError as error:  # a budget: what was made is there, and is counted
        if not count_rows(tokens / "train.parquet"):
            raise
        return tokens, [str(error)], warnings
    return tokens, [], warnings
