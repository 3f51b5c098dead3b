"""A model's own forward pass over rows padded on the left: any model, any device.

Some families see the padding, others keep no cache or one that does not go on where the row ended: see `try_ways`.

Dimensions: `B` rows of a batch, `T` tokens of a row with its padding, `K` kept positions, `S` positions of a slice, `V`
vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.evaluation.flat import UnsupportedModelError, compare, compute_logits, describe_failure, make_trial_rows
from tasks.families.adaptation import find_head
from tasks.families.packing import find_row_limit

_FAILURES = (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError, NotImplementedError)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ways:
    """What a model's own forward pass may be trusted with."""

    pads: bool = True
    """Rows of different lengths side by side."""
    caches: bool = True
    """Going on from what it kept of the tokens before."""


BOTH = Ways()


def try_ways(model: PreTrainedModel) -> Ways:
    """Try out padding, and a cache, against single rows without either; log what is left out."""
    rows = make_trial_rows(model)
    limit = find_row_limit(model.config.get_text_config())
    counts = limit[1] if limit is not None and not limit[0] else ""
    pads = counts or _explain_difference(lambda: _try_padding(model, rows))
    if pads:
        logger.warning("Rows of different lengths are not evaluated side by side, which is slower: %s", pads)
        rows = [row[: min(map(len, rows))] for row in rows]
    caches = _explain_difference(lambda: _try_cache(model, rows, Ways(pads=not pads)))
    if caches:
        logger.warning("Each token of an answer is computed with all before it, which is slower: %s", caches)
    return Ways(not pads, not caches)


def cut_batches(lengths: Sequence[int], batch_size: int, ways: Ways) -> Iterator[list[int]]:
    """Yield which rows go together: as many as fit, in their order; of one length where a model sees the padding."""
    batch: list[int] = []
    for row, length in enumerate(lengths):
        if len(batch) == batch_size or (batch and not ways.pads and length != lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def decode_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rooms: Sequence[int],
    stop_ids: frozenset[int],
    ways: Ways = BOTH,
) -> list[list[int]]:
    """Decode one batch; a row that has ended leaves it, so that the others get cheaper.

    Args:
        model: causal language model, in eval mode.
        prompts: of the batch; none may be empty.
        rooms: most tokens of each answer, at least 1.
        stop_ids: ids that end an answer.
        ways: of `try_ways`; without padding all prompts are of one length.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    input_ids, mask, positions = pad_left(prompts, model.device)
    cache = None
    while True:
        given = (mask, positions) if ways.pads else (None, None)
        logits, cache = forward(model, input_ids, *given, cache=cache, use_cache=ways.caches, keep=1)
        tokens = logits[:, -1].argmax(dim=-1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if token not in stop_ids:
                answers[row].append(token)
        # Indices into the present batch of the rows that go on.
        alive = [
            at
            for at, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if token not in stop_ids and len(answers[row]) < rooms[row]
        ]
        if not alive:
            return answers
        if len(alive) < len(rows):
            index = torch.tensor(alive, device=model.device)
            if ways.caches:
                cache.reorder_cache(index)
            input_ids, mask, positions = input_ids[index], mask[index], positions[index]
            rows, tokens = [rows[at] for at in alive], [tokens[at] for at in alive]
        newest, next_positions = torch.tensor(tokens, device=model.device).unsqueeze(1), positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if ways.caches:
            input_ids, positions = newest, next_positions
        else:
            input_ids, positions = torch.cat([input_ids, newest], dim=1), torch.cat([positions, next_positions], dim=1)


@torch.inference_mode()
def score_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    max_slice_logits: int,
    ways: Ways = BOTH,
) -> list[float]:
    """Return the sums of -log p(target) of the rows of one batch, in nats.

    With padding on the left every target ends in the last column, so that one number of kept positions serves all
    rows. Where their logits would be too many, the columns are fed in slices of S with a key-value cache; all at once
    where the model keeps none.
    """
    assert all(targets), "an empty target has no likelihood"
    rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    input_ids, mask, positions = pad_left(rows, model.device)
    num_scored = [len(target) for target in targets]
    longest, width = max(num_scored), input_ids.shape[1]
    slice_width = max(1, max_slice_logits // (len(rows) * count_vocabulary(model))) if ways.caches else width
    sums = torch.zeros(len(rows), dtype=torch.float64)
    # Column c predicts column c + 1; the last column predicts nothing.
    first, end, fed = width - 1 - longest, width - 1, 0
    cache: Any = None
    while fed < end:
        stop = min(max(fed, first) + slice_width, end)
        given = (mask[:, :stop], positions[:, fed:stop]) if ways.pads else (None, None)
        logits, cache = forward(
            model,
            input_ids[:, fed:stop],
            *given,
            cache=cache,
            use_cache=stop < end or cache is not None,
            keep=stop - max(fed, first),
        )
        for row, count in enumerate(num_scored):
            begin = max(fed, first, width - 1 - count)
            if begin < stop:
                wanted = input_ids[row, begin + 1 : stop + 1]
                # Row by row, so that the fp32 copy of 16-bit logits stays small.
                losses = functional.cross_entropy(logits[row, begin - stop :].float(), wanted, reduction="none")
                sums[row] += losses.double().sum().cpu()
        fed = stop
    return sums.tolist()


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input_ids, attention mask and position_ids, each `[B, T]`, with the rows ending in the last column.

    Positions count from 0 at each row's first token. The padding's id is 0 and never seen: the mask hides it.
    """
    assert all(rows), "an empty row has no last token to continue from"
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        input_ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return input_ids.to(device), mask.to(device), positions.to(device)


def forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
    *,
    cache: Any,
    use_cache: bool,
    keep: int,
) -> tuple[torch.Tensor, Any]:
    """Return the logits `[B, K, V]` of the last `keep` positions, and the cache.

    `input_ids` and `positions` hold the new columns only, `mask` also those that are in the cache already; both are
    None for rows without padding, where the model's own are left to it.

    Raises:
        UnsupportedModelError: a cache is wanted, and the model keeps none.
    """
    # Some architectures have no positions to give (ALiBi), cannot restrict the logits, or keep no cache.
    known = inspect.signature(model.forward).parameters
    # Mamba's has another name.
    name = "cache_params" if "cache_params" in known else "past_key_values"
    given = {"attention_mask": mask, "position_ids": positions, name: cache}
    optional = {key: value for key, value in given.items() if value is not None}
    optional |= {"logits_to_keep": keep, "use_cache": use_cache}
    output = model(input_ids=input_ids, **{key: value for key, value in optional.items() if key in known})
    if use_cache and name not in output:
        raise UnsupportedModelError("it gives back nothing that it kept of the tokens before")
    return output.logits[:, -keep:], getattr(output, name) if use_cache else None


def count_vocabulary(model: PreTrainedModel) -> int:
    """Return how many logits a position has."""
    head = find_head(model)
    weight: Any = (model.get_input_embeddings() if head is None else head).weight
    return int(weight.shape[0])


def _explain_difference(work: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Return why what is wanted and what is found on a trial are not alike; empty where they are."""
    try:
        compare(*work())
    except UnsupportedModelError as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        return describe_failure(error)
    return ""


@torch.inference_mode()
def _try_padding(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of all tokens of rows, alone and side by side."""
    input_ids, mask, positions = pad_left(rows, model.device)
    padded, _ = forward(model, input_ids, mask, positions, cache=None, use_cache=False, keep=input_ids.shape[1])
    found = torch.cat([logits[-len(row) :] for logits, row in zip(padded, rows, strict=True)])
    return torch.cat([compute_logits(model, row) for row in rows]), found


@torch.inference_mode()
def _try_cache(model: PreTrainedModel, rows: Sequence[Sequence[int]], ways: Ways) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of both rows' last token but one and of the second row's last: at once, and token by token."""
    input_ids, mask, positions = pad_left([row[:-2] for row in rows], model.device)
    given = (mask, positions) if ways.pads else (None, None)
    _, cache = forward(model, input_ids, *given, cache=None, use_cache=True, keep=1)
    found = []
    for at, alive in ((-2, [0, 1]), (-1, [1])):
        index = torch.tensor(alive, device=model.device)
        if len(alive) < len(rows):
            cache.reorder_cache(index)
        input_ids = torch.tensor([[rows[row][at]] for row in alive], device=model.device)
        mask = torch.cat([mask[index], mask.new_ones(len(alive), 1)], dim=1)
        positions = positions[index][:, -1:] + 1
        given = (mask, positions) if ways.pads else (None, None)
        logits, cache = forward(model, input_ids, *given, cache=cache, use_cache=True, keep=1)
        found.append(logits[:, -1])
    expected = [compute_logits(model, row) for row in rows]
    return torch.stack([*(logits[-2] for logits in expected), expected[1][-1]]), torch.cat(found)
