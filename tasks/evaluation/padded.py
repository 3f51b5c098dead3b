"""A model's own forward pass over rows padded on the left: any model, any device.

Dimensions: `B` rows of a batch, `T` tokens of a row with its padding, `K` kept positions, `S` positions of a slice, `V`
vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel


@torch.inference_mode()
def decode_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], rooms: Sequence[int], stop_ids: frozenset[int]
) -> list[list[int]]:
    """Decode one batch; a row that has ended leaves it, so that the others get cheaper.

    Args:
        model: causal language model, in eval mode.
        prompts: of the batch; none may be empty.
        rooms: most tokens of each answer, at least 1.
        stop_ids: ids that end an answer.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    input_ids, mask, positions = pad_left(prompts, model.device)
    cache = None
    while True:
        logits, cache = forward(model, input_ids, mask, positions, cache=cache, use_cache=True, keep=1)
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
            cache.reorder_cache(index)
            mask, positions = mask[index], positions[index]
            rows, tokens = [rows[at] for at in alive], [tokens[at] for at in alive]
        input_ids = torch.tensor(tokens, device=model.device).unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1


@torch.inference_mode()
def score_padded(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    max_slice_logits: int,
) -> list[float]:
    """Return the sums of -log p(target) of the rows of one batch, in nats.

    With padding on the left every target ends in the last column, so that one number of kept positions serves all
    rows. Where their logits would be too many, the columns are fed in slices of S with a key-value cache.
    """
    assert all(targets), "an empty target has no likelihood"
    rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    input_ids, mask, positions = pad_left(rows, model.device)
    num_scored = [len(target) for target in targets]
    longest, width = max(num_scored), input_ids.shape[1]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    slice_width = max(1, max_slice_logits // (len(rows) * vocabulary))
    sums = torch.zeros(len(rows), dtype=torch.float64)
    # Column c predicts column c + 1; the last column predicts nothing.
    first, end, fed = width - 1 - longest, width - 1, 0
    cache: Any = None
    while fed < end:
        stop = min(max(fed, first) + slice_width, end)
        logits, cache = forward(
            model,
            input_ids[:, fed:stop],
            mask[:, :stop],
            positions[:, fed:stop],
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
    mask: torch.Tensor,
    positions: torch.Tensor,
    *,
    cache: Any,
    use_cache: bool,
    keep: int,
) -> tuple[torch.Tensor, Any]:
    """Return the logits `[B, K, V]` of the last `keep` positions, and the cache.

    `input_ids` and `positions` hold the new columns only, `mask` also those that are in the cache already.
    """
    # Some architectures have no positions to give (ALiBi) or cannot restrict the logits.
    known = inspect.signature(model.forward).parameters
    optional = {"position_ids": positions, "logits_to_keep": keep}
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=use_cache,
        **{name: value for name, value in optional.items() if name in known},
    )
    return output.logits[:, -keep:], output.past_key_values if use_cache else None
