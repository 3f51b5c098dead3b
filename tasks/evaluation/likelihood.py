"""Negative log-likelihood of reference answers: rows end to end without padding, or padded batches.

Dimensions: `T` tokens of a flat input, `N` scored tokens of it, `V` vocabulary.
"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.evaluation.flat import Rows, UnsupportedModelError, check_model, flat_attention, lay_flat, run_flat
from tasks.evaluation.generation import PADDED_BATCH, Progress, ignore_progress
from tasks.evaluation.memory import shrink_until_it_fits
from tasks.evaluation.padded import count_vocabulary, cut_batches, score_padded, try_ways

MAX_SLICE_LOGITS = 2**26
"""Most logits that exist at once in fp32: 256 MiB. At least one position is always taken."""
PACK_TOKENS = {"cuda": 16384, "cpu": 2048}
"""Tokens of a forward pass: enough to fill a GPU, few enough for the caches of a CPU."""
MAX_PACK_LOGITS = {"cuda": 2**29, "cpu": MAX_SLICE_LOGITS}
"""Most logits of a forward pass, in the model's dtype: 1 GiB in 16 bits."""
MIN_PACK_TOKENS = 256

logger = logging.getLogger(__name__)


def score_targets(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    *,
    batch_size: int | Literal["auto"] = "auto",
    on_progress: Progress = ignore_progress,
) -> list[float]:
    """Return `-sum(log p(target token | prompt, target tokens before))` of each row, in nats.

    Divide by the number of target tokens for the nll a token. Where memory runs out, half as much goes at once.

    Args:
        model: causal language model, in eval mode.
        prompts: token ids; none may be empty.
        targets: token ids of the reference answers; none may be empty.
        batch_size: rows of a batch where a model needs padding; auto: 16.
        on_progress: called with the rows that have been scored since.
    """
    assert all(targets), "an empty target has no likelihood"
    sums: dict[int, float] = {}
    kind = model.device.type
    try:
        check_model(model)
    except UnsupportedModelError as error:
        logger.warning("Answers are scored in padded batches, which is slower: %s", error)
    else:
        most_scored = MAX_PACK_LOGITS.get(kind, MAX_SLICE_LOGITS) // count_vocabulary(model)
        # A longer target goes the padded way, which takes its positions in slices.
        fitting = [row for row in range(len(prompts)) if len(targets[row]) <= most_scored]
        flat = partial(score_flat, model, prompts, targets, fitting, sums, most_scored, on_progress)
        pack_tokens = PACK_TOKENS.get(kind, PACK_TOKENS["cpu"])
        shrink_until_it_fits(flat, pack_tokens, name="tokens of a forward pass", smallest=MIN_PACK_TOKENS)
    padded = partial(score_in_batches, model, prompts, targets, sums, MAX_SLICE_LOGITS, on_progress)
    size = PADDED_BATCH if batch_size == "auto" else batch_size
    shrink_until_it_fits(padded, size, name="evaluation.batch_size")
    return [sums[row] for row in range(len(prompts))]


def score_flat(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    fitting: Sequence[int],
    sums: dict[int, float],
    most_scored: int,
    on_progress: Progress,
    pack_tokens: int,
) -> None:
    """Put the sums that are still missing of the fitting rows into `sums`, as many rows at once as fit into a pack.

    Args:
        model: that `check_model` has passed.
        prompts: all.
        targets: all.
        fitting: rows whose targets have at most `most_scored` tokens.
        sums: by row.
        most_scored: tokens of a pack.
        on_progress: called after each pack.
        pack_tokens: most tokens of a pack; a longer row has one to itself.
    """
    # The longest first: what does not fit into memory fails at the start. The last token predicts nothing.
    missing = [row for row in fitting if row not in sums]
    lengths = {row: len(prompts[row]) + len(targets[row]) - 1 for row in missing}
    waiting = sorted(missing, key=lambda row: -lengths[row])
    with flat_attention(model):
        while waiting:
            num_tokens = num_scored = count = 0
            for row in waiting:
                num_tokens += lengths[row]
                num_scored += len(targets[row])
                if count and (num_tokens > pack_tokens or num_scored > most_scored):
                    break
                count += 1
            pack, waiting = waiting[:count], waiting[count:]
            values = _score_pack(model, [prompts[row] for row in pack], [targets[row] for row in pack])
            sums.update(zip(pack, values, strict=True))
            on_progress(len(pack))


@torch.inference_mode()
def _score_pack(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> list[float]:
    """Score rows end to end, with logits at the positions that predict a target's token only."""
    flat = lay_flat([[*prompt, *target[:-1]] for prompt, target in zip(prompts, targets, strict=True)], model.device)
    counts = [len(target) for target in targets]
    ends = flat.segments.borders[1:].tolist()
    keep = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    wanted = torch.tensor([token for target in targets for token in target], device=model.device)
    logits = run_flat(model, flat.input_ids, flat.positions, Rows(flat.segments), keep.to(model.device))
    losses = compute_losses(logits, wanted).double().cpu()
    return [float(part.sum()) for part in losses.split(counts)]


def compute_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return -log p(wanted) [N] in fp32 of logits [N, V], a slice of them at a time where they have to be widened."""
    rows = max(1, MAX_SLICE_LOGITS // logits.shape[1])
    parts = zip(logits.split(rows), wanted.split(rows), strict=True)
    return torch.cat([functional.cross_entropy(part.float(), ids, reduction="none") for part, ids in parts])


def score_in_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    sums: dict[int, float],
    max_slice_logits: int,
    on_progress: Progress,
    batch_size: int,
) -> None:
    """Put the sums that are still missing into `sums`; rows of similar length share a padded batch."""
    missing = [row for row in range(len(prompts)) if row not in sums]
    if not missing:
        return
    order = sorted(missing, key=lambda row: -len(prompts[row]) - len(targets[row]))
    ways = try_ways(model)
    for places in cut_batches([len(prompts[row]) + len(targets[row]) for row in order], batch_size, ways):
        rows = [order[place] for place in places]
        batch = [prompts[row] for row in rows], [targets[row] for row in rows]
        sums.update(zip(rows, score_padded(model, *batch, max_slice_logits, ways), strict=True))
        on_progress(len(rows))
