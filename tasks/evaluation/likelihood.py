"""Negative log-likelihood of reference answers, in batches and with bounded memory.

Dimensions: `B` rows of a batch, `T` tokens of a row with its padding, `K` scored tokens of the longest target,
`S` positions of a slice, `V` vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.evaluation.generation import Progress, forward, ignore_progress, pad_left

MAX_SLICE_LOGITS = 2**26
"""Most logits that exist at once (`B * S * V`): 256 MiB in fp32. At least one position is always taken."""


def score_targets(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_slice_logits: int = MAX_SLICE_LOGITS,
    on_progress: Progress = ignore_progress,
) -> list[float]:
    """Return `-sum(log p(target token | prompt, target tokens before))` of each row, in nats.

    Rows of similar length share a batch. Divide by the number of target tokens for the nll a token.

    Args:
        model: causal language model, in eval mode.
        prompts: token ids; none may be empty.
        targets: token ids of the reference answers; none may be empty.
        batch_size: rows scored at once.
        max_slice_logits: bound of the memory for logits; see MAX_SLICE_LOGITS.
        on_progress: called after each batch.
    """
    sums = [0.0] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]) - len(targets[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = _score_batch(model, [prompts[at] for at in rows], [targets[at] for at in rows], max_slice_logits)
        for row, value in zip(rows, batch, strict=True):
            sums[row] = value
        on_progress(len(rows))
    return sums


@torch.inference_mode()
def _score_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    max_slice_logits: int,
) -> list[float]:
    """Score one batch.

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
