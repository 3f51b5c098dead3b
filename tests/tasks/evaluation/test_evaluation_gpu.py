"""Answers and likelihoods on a GPU: recorded steps, FlashAttention, and a memory that is too small."""

import gc
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tasks.evaluation.generation import decode_in_batches, generate_greedy, ignore_progress
from tasks.evaluation.likelihood import score_in_batches, score_targets
from tasks.evaluation.slots import Prompt, SlotDecoder, check_slots, choose_num_slots
from tests.tasks.evaluation.families import FAMILIES, build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STOPS = frozenset(range(0, 97, 10))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def place(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Build a model on the GPU."""
    model: Any = build(family)
    return model.to("cuda", dtype)


def draw(count: int, *, least: int = 1, most: int = 60, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, most, (count,), generator=generator).tolist()
    return [torch.randint(97, (length,), generator=generator).tolist() for length in lengths]


def generate_alone(model: PreTrainedModel, prompt: list[int], stops: frozenset[int], new_tokens: int) -> list[int]:
    """What transformers' own loop gives for one row."""
    generate: Any = model.generate
    input_ids = torch.tensor([prompt], device="cuda")
    output = generate(
        input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=sorted(stops) or None, pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    return output[:-1] if output[-1] in stops else output


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = place(family), draw(24)
    expected = [generate_alone(model, prompt, STOPS, 24) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) >= 4
    for batch_size in ("auto", 7):
        answers = generate_greedy(model, prompts, stop_ids=STOPS, max_new_tokens=24, batch_size=batch_size)
        assert answers == expected
    assert "padded" not in caplog.text
    if family != "mixtral":  # Which experts a token takes is the host's to know there.
        assert "cannot be recorded" not in caplog.text


def test_steps_are_recorded_once_a_shape() -> None:
    model, prompts = place("qwen3"), draw(40)
    decoder = SlotDecoder(model, num_slots=40, slot_length=100, longest_answer=24, stop_ids=STOPS)
    assert decoder.recorder is not None
    answers: dict[int, list[int]] = {}
    decoder.decode([Prompt(row, tokens, 24) for row, tokens in enumerate(prompts)], answers, ignore_progress)
    shapes = set(decoder.recorder.graphs)
    assert 40 in {width for width, _ in shapes} <= {40, 20, 10}
    assert {num_seen for _, num_seen in shapes} <= {64, 96}
    assert len(answers) == 40


def test_rows_end_with_the_context_and_with_the_limit() -> None:
    model = place("llama")
    answers = generate_greedy(model, [[5] * 128, [5] * 120, [5] * 3], stop_ids=frozenset(), max_new_tokens=20)
    assert [len(tokens) for tokens in answers] == [0, 8, 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_likelihoods_are_the_padded_ones(family: str) -> None:
    model, prompts, targets = place(family), draw(33), draw(33, seed=1)
    sums: dict[int, float] = {}
    score_in_batches(model, prompts, targets, sums, 2**26, ignore_progress, 8)
    assert score_targets(model, prompts, targets) == pytest.approx([sums[row] for row in range(33)], rel=1e-5, abs=1e-4)
    in_bf16 = score_targets(model.to(torch.bfloat16), prompts, targets)  # By FlashAttention.
    assert sum(in_bf16) == pytest.approx(sum(sums.values()), rel=0.02)


def test_bf16_answers_agree_for_the_most_part() -> None:
    model = place("qwen3", torch.bfloat16)
    prompts = draw(64)
    expected: dict[int, list[int]] = {}
    waiting = [Prompt(row, tokens, 12) for row, tokens in enumerate(prompts)]
    decode_in_batches(model, waiting, expected, STOPS, ignore_progress, 1)
    answers = generate_greedy(model, prompts, stop_ids=STOPS, max_new_tokens=12)
    assert sum(answers[row] == expected[row] for row in range(64)) >= 48


def test_slots_that_do_not_fit_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    # A slot of 30,000 tokens takes 11.7 MB: 64 of them are more than half a gigabyte, 32 are less.
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32768, initializer_range=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().cuda()
    assert check_slots(model) == 3 * 2 * 2 * 8 * 4
    prompts, stops = draw(64), frozenset(range(0, 97, 2))
    expected = generate_greedy(model, prompts, stop_ids=stops, max_new_tokens=30_000, batch_size=8)
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 0.5e9
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        answers = generate_greedy(model, prompts, stop_ids=stops, max_new_tokens=30_000, batch_size=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory: going on with evaluation.batch_size 32" in caplog.text
    assert answers == expected


def test_the_free_memory_says_how_many_slots_there_are() -> None:
    device = torch.device("cuda")
    free = torch.cuda.mem_get_info()[0]
    prompts = [Prompt(row, [5] * 100, 28) for row in range(3)]
    # A slot takes 128 tokens.
    assert choose_num_slots(prompts, 1, device) == 256
    assert choose_num_slots(prompts, free // 128, device) == 1
    assert 3 <= choose_num_slots(prompts, free // 128 // 8, device) <= 5
