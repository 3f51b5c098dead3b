"""A model answers prompts and scores references: here, or in processes of its own, each with its share of the rows.

A share is a file, so that a process of another machine can be given it. What decides an answer is the same however the
rows are shared: the prompt, the model, and what ends an answer.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from schemas.plurals import count_of
from tasks import execution, storage
from tasks.evaluation.generation import Progress, find_stop_ids, generate_greedy, ignore_progress
from tasks.evaluation.likelihood import score_targets
from tasks.models import choose_device, choose_dtype, load_model, load_tokenizer
from tasks.parcels import Enclosure, Parcel

logger = logging.getLogger(__name__)

ROWS_A_SHARE = 256
"""Most rows of a share: what a lost process costs. Fewer, so that each process gets its part."""
FEWEST_ROWS_FOR_CLUSTER = 1000
"""Below, sending the model takes longer than answering."""


@dataclass(frozen=True)
class Asked:
    """Prompts, with the references of the first of them."""

    prompts: list[list[int]]
    targets: list[list[int]]
    ends: list[list[int]]
    """References, one with each last token, of the whole set that the rows are from: they may end an answer."""
    is_answered: bool = True
    """Off: only the references are scored, of which each prompt has one; the answers are empty."""


@dataclass(frozen=True)
class Terms:
    """What is the same for all shares."""

    max_new_tokens: int
    batch_size: int | Literal["auto"]
    precision: str
    num_ids: int
    """That the model must have embeddings for."""


Answered = tuple[list[list[int]], list[float]]
"""The answer to each prompt, and -log p of each reference in nats."""
Answer = Callable[[Asked], Answered]


def collect_ends(targets: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return references of one token: each last one that there is."""
    return [[last] for last in sorted({target[-1] for target in targets if target})]


@contextmanager
def answering(
    model: Path, tokenizer: Path, terms: Terms, *, num_processes: int, num_rows: int, advance: Progress
) -> Iterator[Answer]:
    """Give what answers sets of prompts.

    Args:
        model: folder of the model.
        tokenizer: folder of the tokenizer, with the generation config that ships with it, if any.
        terms: see there.
        num_processes: of this machine, one a GPU; 1: this process.
        num_rows: of all sets together: many go to the cluster that SFT_RAY_ADDRESS names, if any suits.
        advance: gets the numbers of rows that were answered or scored since.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    kind = choose_device().type
    on_cluster = num_rows >= FEWEST_ROWS_FOR_CLUSTER and execution.count_model_places(kind) > 0
    if num_processes == 1 and not on_cluster:
        loaded = load_for(model, terms)
        yield lambda asked: answer(loaded, tokenizer, asked, terms, advance)
        return
    num_shares = execution.count_model_places(kind) if on_cluster else num_processes
    with (
        storage.new_folder() as folder,
        execution.model_workers(None if on_cluster else _list_places(kind, num_processes), kind=kind) as spread,
    ):

        def answer_set(asked: Asked) -> Answered:
            files = _write_shares(asked, folder, num_shares)
            calls = [(model, tokenizer, file, terms) for _, file in files]
            sizes = [len(rows) + sum(row < len(asked.targets) for row in rows) for rows, _ in files]

            def tell(num_done: int, num_all: int) -> None:
                advance(sizes[num_done - 1] if asked.is_answered else 0)

            answered = spread(answer_share, calls, parcel=_enclose, tell=tell)
            return _gather(asked, [rows for rows, _ in files], answered)

        yield answer_set


def load_for(folder: Path, terms: Terms) -> PreTrainedModel:
    """Load a model onto this process's device, with room for all ids."""
    device = choose_device()
    model = load_model(folder, dtype=choose_dtype(terms.precision, device), device=device)
    _make_room_for_ids(model, terms.num_ids)
    return model


def answer(
    model: PreTrainedModel, tokenizer: Path, asked: Asked, terms: Terms, advance: Progress = ignore_progress
) -> Answered:
    """Answer prompts and score references with a model that is loaded."""
    scored = asked.prompts[: len(asked.targets)]
    if not asked.is_answered:
        return [[] for _ in asked.prompts], score_targets(model, scored, asked.targets, batch_size=terms.batch_size)
    configs = (model.generation_config, _shipped_config(tokenizer))
    answers = generate_greedy(
        model,
        asked.prompts,
        stop_ids=find_stop_ids(configs, load_tokenizer(tokenizer), asked.ends),
        max_new_tokens=terms.max_new_tokens,
        batch_size=terms.batch_size,
        on_progress=advance,
    )
    return answers, score_targets(model, scored, asked.targets, batch_size=terms.batch_size, on_progress=advance)


def answer_share(model: Path, tokenizer: Path, share: Path, terms: Terms) -> Answered:
    """Answer the prompts of a file; the model stays loaded for the next one."""
    asked = Asked(**json.loads(share.read_text(encoding="utf-8")))
    return answer(_keep_loaded(model, terms), tokenizer, asked, terms)


@lru_cache(maxsize=1)
def _keep_loaded(folder: Path, terms: Terms) -> PreTrainedModel:
    return load_for(folder, terms)


def _enclose(model: Path, tokenizer: Path, share: Path, terms: Terms) -> Parcel:
    return Parcel((Enclosure(model, is_common=True), Enclosure(tokenizer, is_common=True), Enclosure(share)))


def _write_shares(asked: Asked, folder: Path, num_shares: int) -> list[tuple[list[int], Path]]:
    """Deal prompts in turns, the longest first, so that shares take as long; return which are in each share's file."""
    order = sorted(range(len(asked.prompts)), key=lambda row: -len(asked.prompts[row]))
    num_files = min(len(order), num_shares * -(-len(order) // (num_shares * ROWS_A_SHARE)))
    shares = []
    for number in range(num_files):
        rows = sorted(order[number::num_files])
        targets = [asked.targets[row] for row in rows if row < len(asked.targets)]
        share = Asked([asked.prompts[row] for row in rows], targets, asked.ends, asked.is_answered)
        file = folder / f"share-{len(list(folder.iterdir()))}.json"
        file.write_text(json.dumps(asdict(share)), encoding="utf-8")
        shares.append((rows, file))
    return shares


def _gather(asked: Asked, shares: Sequence[list[int]], answered: Sequence[Answered]) -> Answered:
    answers: list[list[int]] = [[] for _ in asked.prompts]
    sums = [0.0] * len(asked.targets)
    for rows, (own, own_sums) in zip(shares, answered, strict=True):
        for row, tokens in zip(rows, own, strict=True):
            answers[row] = tokens
        for row, value in zip([row for row in rows if row < len(sums)], own_sums, strict=True):
            sums[row] = value
    return answers, sums


def _list_places(kind: str, num_processes: int) -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES is for each process.

    Raises:
        ValueError: there are fewer GPUs.
    """
    if kind != "cuda":
        return [""] * num_processes
    found = execution.list_devices() or [str(number) for number in range(torch.cuda.device_count())]
    if num_processes > len(found):
        raise ValueError(
            f"evaluation.num_processes is {num_processes}, and this machine shows {count_of(len(found), 'GPU')}: set "
            f"it to {len(found)}, or widen CUDA_VISIBLE_DEVICES"
        )
    return found[:num_processes]


def _shipped_config(tokenizer: Path) -> GenerationConfig | None:
    """Return the generation config that ships with the tokenizer, when there is one."""
    exists = (tokenizer / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(str(tokenizer), local_files_only=True) if exists else None


def _make_room_for_ids(model: PreTrainedModel, num_ids: int) -> None:
    """Give ids that the model does not have yet the mean embedding, in memory only.

    A base model lacks the tokens that were added for its chat template; it must still be evaluated with them.
    """
    embeddings: Any = model.get_input_embeddings()
    num_known = embeddings.weight.shape[0]
    if num_ids <= num_known:
        return
    logger.warning("the model has %d embeddings, the tokens need %d: the new ones get the mean", num_known, num_ids)
    model.resize_token_embeddings(num_ids, mean_resizing=False)
    layers: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for layer in layers:
            layer.weight[num_known:] = layer.weight[:num_known].mean(dim=0)
