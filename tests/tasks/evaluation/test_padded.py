"""Families that see the padding, keep no cache or one that goes wrong are scored and answer as each row alone."""

import pytest
import torch
from transformers import PreTrainedModel

from tasks.evaluation.generation import generate_greedy
from tasks.evaluation.likelihood import score_targets
from tasks.evaluation.padded import Ways, cut_batches, try_ways
from tests.tasks.families import tiny
from tests.tasks.families.shapes import SHAPES

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [20, 21, 22, 23, 24, 25, 26, 27, 28], [14, 15, 16]]
TARGETS = [[14, 15], [30, 31, 32, 33], [40], [41, 42, 43, 44]]
STOP = 2


@pytest.mark.parametrize(
    ("case", "ways"),
    [
        ("gemma2", Ways()),
        ("qwen3_next", Ways()),
        ("openai-gpt", Ways(caches=False)),
        ("recurrent_gemma", Ways(pads=False, caches=False)),
        ("rwkv", Ways(pads=False, caches=False)),
        ("mamba", Ways(caches=False)),
        ("deepseek_v4", Ways(pads=False, caches=False)),
        ("falcon_h1_biases", Ways(pads=False, caches=False)),
    ],
)
def test_rows_are_evaluated_as_alone(case: str, ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "SETTINGS", {**tiny.SETTINGS, **SHAPES})
    model = tiny.build_model(case)
    assert try_ways(model) == ways
    alone = [score_alone(model, *row) for row in zip(PROMPTS, TARGETS, strict=True)]
    assert score_targets(model, PROMPTS, TARGETS, batch_size=2) == pytest.approx(alone, abs=1e-4)
    answers = generate_greedy(model, PROMPTS, stop_ids=frozenset({STOP}), max_new_tokens=5, batch_size=3)
    assert answers == [answer_alone(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("openai-gpt", "slower: it gives back nothing that it kept of the tokens before"),
        ("deepseek_v4", "its forward pass stopped (modeling_deepseek_v4.py, line "),
    ],
)
def test_what_is_left_out_is_told_with_its_place(
    case: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tiny, "SETTINGS", {**tiny.SETTINGS, **SHAPES})
    try_ways(tiny.build_model(case))
    assert why in caplog.messages[-1]


def test_batches_hold_rows_of_one_length_where_padding_is_seen() -> None:
    lengths = [9, 9, 9, 7, 7, 3]
    assert list(cut_batches(lengths, 2, Ways())) == [[0, 1], [2, 3], [4, 5]]
    assert list(cut_batches(lengths, 2, Ways(pads=False))) == [[0, 1], [2], [3, 4], [5]]
    assert list(cut_batches([], 2, Ways())) == []


@torch.no_grad()
def score_alone(model: PreTrainedModel, prompt: list[int], target: list[int]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *target]]), use_cache=False).logits[0]
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return -float(scores.gather(1, torch.tensor(target)[:, None]).sum())


@torch.no_grad()
def answer_alone(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < 5:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == STOP:
            break
        answer.append(token)
    return answer
