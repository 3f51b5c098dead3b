import math
import random

import pytest
import torch
from transformers import PreTrainedModel

from tasks.evaluation import padded
from tasks.evaluation.generation import ignore_progress
from tasks.evaluation.likelihood import score_flat, score_in_batches, score_targets
from tests.tasks.evaluation.families import FAMILIES, build


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


def score_padded(
    model: PreTrainedModel,
    prompts: list[list[int]],
    targets: list[list[int]],
    *,
    batch_size: int = 16,
    max_slice_logits: int = 2**26,
) -> list[float]:
    sums: dict[int, float] = {}
    score_in_batches(model, prompts, targets, sums, max_slice_logits, ignore_progress, batch_size)
    return [sums[row] for row in range(len(prompts))]


@pytest.mark.parametrize("batch_size", [1, 5, 17])
# 97 * 17 logits are one position of the largest batch: the smallest slice there is.
@pytest.mark.parametrize("max_slice_logits", [97 * 17, 97 * 17 * 7, 2**26])
def test_padded_sums_do_not_depend_on_batches_or_slices(
    model: PreTrainedModel, batch_size: int, max_slice_logits: int
) -> None:
    prompts, targets = make_rows(17)
    expected = [nll_by_definition(model, *row) for row in zip(prompts, targets, strict=True)]
    sums = score_padded(model, prompts, targets, batch_size=batch_size, max_slice_logits=max_slice_logits)
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_padded_logits_at_once_stay_within_the_bound(model: PreTrainedModel) -> None:
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    padded.score_padded(model, [[5] * 10] * 4, [[6] * 50] * 4, 97 * 4 * 8)
    assert max(sizes) == 97 * 4 * 8
    assert sum(sizes) == 97 * 4 * 50  # Only the positions that predict a target token.


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_to_end_score_as_padded_ones(family: str) -> None:
    model = build(family)
    prompts, targets = make_rows(17)
    sums = score_targets(model, prompts, targets)
    assert sums == pytest.approx(score_padded(model, prompts, targets), rel=1e-5)
    assert sums == pytest.approx([nll_by_definition(model, *row) for row in zip(prompts, targets, strict=True)], 1e-5)


@pytest.mark.parametrize("pack_tokens", [1, 90, 10_000])
def test_sums_do_not_depend_on_the_packs(model: PreTrainedModel, pack_tokens: int) -> None:
    prompts, targets = make_rows(17)
    sums: dict[int, float] = {3: 0.5}  # A row that has been scored before stays as it is.
    reported: list[int] = []
    score_flat(model, prompts, targets, range(17), sums, 60, reported.append, pack_tokens)
    assert sums.pop(3) == 0.5
    assert sum(reported) == 16
    expected = score_padded(model, prompts, targets)
    assert sums == pytest.approx({row: expected[row] for row in range(17) if row != 3}, rel=1e-5)


def test_the_head_sees_scored_positions_only_and_no_more_than_allowed(model: PreTrainedModel) -> None:
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape[1]))
    score_flat(model, [[5] * 10] * 4, [[6] * 50] * 4, range(4), {}, 120, ignore_progress, 10_000)
    assert sizes == [100, 100]


def test_a_target_with_too_many_logits_is_scored_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3")
    expected = score_targets(model, [[5] * 10] * 2, [[6, 7] * 25, [8] * 5])
    monkeypatch.setattr("tasks.evaluation.likelihood.MAX_PACK_LOGITS", {"cpu": 97 * 20})
    monkeypatch.setattr("tasks.evaluation.likelihood.MAX_SLICE_LOGITS", 97 * 8)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda layer, inputs, output: sizes.append(output.numel()))
    assert score_targets(model, [[5] * 10] * 2, [[6, 7] * 25, [8] * 5]) == pytest.approx(expected, rel=1e-5)
    assert sizes[-7:] == [97 * 8] * 6 + [97 * 2]  # Behind those of the trials: 50 positions.


def test_packs_that_do_not_fit_are_halved(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    prompts, targets = make_rows(60)
    expected = score_padded(model, prompts, targets)

    def run_out(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].numel() > 600:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_pre_hook(run_out)
    assert score_targets(model, prompts, targets) == pytest.approx(expected, rel=1e-5)
    assert "going on with tokens of a forward pass 512" in caplog.text


def test_a_model_that_needs_padding_is_scored_with_it(caplog: pytest.LogCaptureFixture) -> None:
    model = build("falcon")
    prompts, targets = make_rows(7)
    assert score_targets(model, prompts, targets, batch_size=3) == score_padded(model, prompts, targets, batch_size=3)
    assert "Answers are scored in padded batches, which is slower: on a trial its logits differ" in caplog.text


def test_a_uniform_model_needs_log_v_for_each_token(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    sums = score_targets(model, [[5], [6, 7]], [[8, 9, 10], [11]])
    assert sums == pytest.approx([3 * math.log(97), math.log(97)], rel=1e-6)
