import math
import random

import pytest
import torch
from transformers import PreTrainedModel

from tasks.evaluation.likelihood import score_targets


def make_rows(count: int) -> tuple[list[list[int]], list[list[int]]]:
    source = random.Random(3)
    sizes = [(source.randrange(1, 40), source.randrange(1, 30)) for _ in range(count)]
    rows = [([source.randrange(97) for _ in range(a)], [source.randrange(97) for _ in range(b)]) for a, b in sizes]
    return [prompt for prompt, _ in rows], [target for _, target in rows]


def nll_by_definition(model: PreTrainedModel, prompt: list[int], target: list[int]) -> float:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + target]), use_cache=False).logits[0].double()
    log_p = torch.log_softmax(logits, dim=-1)
    return -sum(float(log_p[len(prompt) + at - 1, token]) for at, token in enumerate(target))


@pytest.mark.parametrize("batch_size", [1, 5, 17])
# 97 * 17 logits are one position of the largest batch: the smallest slice there is.
@pytest.mark.parametrize("max_slice_logits", [97 * 17, 97 * 17 * 7, 2**26])
def test_sums_do_not_depend_on_batches_or_slices(
    model: PreTrainedModel, batch_size: int, max_slice_logits: int
) -> None:
    prompts, targets = make_rows(17)
    expected = [nll_by_definition(model, *row) for row in zip(prompts, targets, strict=True)]
    sums = score_targets(model, prompts, targets, batch_size=batch_size, max_slice_logits=max_slice_logits)
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_logits_at_once_stay_within_the_bound(model: PreTrainedModel) -> None:
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    score_targets(model, [[5] * 10] * 4, [[6] * 50] * 4, batch_size=4, max_slice_logits=97 * 4 * 8)
    assert max(sizes) == 97 * 4 * 8
    assert sum(sizes) == 97 * 4 * 50  # Only the positions that predict a target token.


def test_a_uniform_model_needs_log_v_for_each_token(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    sums = score_targets(model, [[5], [6, 7]], [[8, 9, 10], [11]], batch_size=2)
    assert sums == pytest.approx([3 * math.log(97), math.log(97)], rel=1e-6)
