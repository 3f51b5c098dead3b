import random

import pytest
import torch
from transformers import PreTrainedModel

from tasks.evaluation.flat import UnsupportedModelError, check_model
from tasks.evaluation.generation import decode_in_batches, decode_in_slots, generate_greedy, ignore_progress
from tasks.evaluation.memory import shrink_until_it_fits
from tasks.evaluation.slots import Prompt, check_slots, round_up
from tests.tasks.evaluation.families import FAMILIES, build

# A tenth of the vocabulary stops, so that slots fall free at different steps.
STOPS = frozenset(range(0, 97, 10))


def make_prompts(count: int, *, room: int = 24, longest: int = 60) -> list[Prompt]:
    source = random.Random(0)
    lengths = sorted((source.randrange(1, longest) for _ in range(count)), reverse=True)
    return [Prompt(row, [source.randrange(97) for _ in range(n)], room) for row, n in enumerate(lengths)]


def in_slots(
    model: PreTrainedModel, prompts: list[Prompt], num_slots: int, stops: frozenset[int] = STOPS
) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    decode_in_slots(model, prompts, answers, stops, ignore_progress, num_slots)
    return answers


def in_batches(
    model: PreTrainedModel, prompts: list[Prompt], stops: frozenset[int] = STOPS, batch_size: int = 8
) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    decode_in_batches(model, prompts, answers, stops, ignore_progress, batch_size)
    return answers


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_slots(family: str) -> None:
    model, prompts = build(family), make_prompts(29)
    expected = in_batches(model, prompts)
    assert len({len(answer) for answer in expected.values()}) > 8
    # 29 slots: all at once, then fewer and fewer; 5 slots: each is taken six times.
    for num_slots in (29, 5):
        assert in_slots(model, prompts, num_slots) == expected
    assert model.config._attn_implementation == "sdpa"


def test_a_slot_that_falls_free_is_taken_by_the_next_row() -> None:
    model = build("qwen3")
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape[1]))
    prompts = make_prompts(29)
    in_slots(model, prompts, 10)
    num_prompt_tokens = sum(len(prompt.tokens) for prompt in prompts)
    steps = seen.count(10)
    # Every prompt went in once; had each ten waited for the slowest of them, 3 * 23 steps would have been done.
    assert sum(seen) == num_prompt_tokens + steps * 10
    assert steps < 60


def test_rows_that_go_on_are_brought_together_when_few_are_left() -> None:
    model = build("qwen3")
    prompts = [Prompt(row, [5 + row, 7], 2 if row % 4 else 30) for row in range(64)]
    expected = in_batches(model, prompts, frozenset(), 64)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape[1]))
    assert in_slots(model, prompts, 64, frozenset()) == expected
    assert seen == [128] + [64] * 8 + [16] * 24


def test_rooms_are_kept_row_by_row() -> None:
    model = build("llama")
    prompts = [Prompt(0, [5] * 120, 8), Prompt(1, [5] * 3, 20), Prompt(2, [6], 1)]
    for num_slots in (3, 1):
        answers = in_slots(model, prompts, num_slots, frozenset())
        assert [len(answers[row]) for row in range(3)] == [8, 20, 1]


def test_a_row_that_stops_at_once_is_empty() -> None:
    model, prompts = build("llama"), make_prompts(9, room=5)
    first = in_batches(model, prompts, frozenset())[4][0]
    answers = in_slots(model, prompts, 3, frozenset({first}))
    assert answers[4] == []
    assert answers == in_batches(model, prompts, frozenset({first}))


def test_every_row_is_reported_once() -> None:
    reported: list[int] = []
    decode_in_slots(build("llama"), make_prompts(23), {}, STOPS, reported.append, 7)
    assert sum(reported) == 23


def test_the_trial_tells_the_bytes_of_a_token() -> None:
    # 3 layers, keys and values, 2 heads of 8 numbers of 4 bytes
    assert check_slots(build("llama")) == 3 * 2 * 2 * 8 * 4


def test_models_that_cannot_be_run_flat_are_told_apart() -> None:
    with pytest.raises(UnsupportedModelError, match="on a trial its logits differ"):
        check_model(build("falcon"))
    model = build("qwen3")
    model.config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(UnsupportedModelError, match="its rotary angles are dynamic"):
        check_model(model)


def test_an_attention_with_an_extra_term_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="s_aux"):
        check_model(build("gpt_oss"))


def test_slots_that_do_not_fit_are_halved_and_what_was_done_stays_done(caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = build("llama"), make_prompts(30)
    expected = in_batches(model, prompts)
    answers: dict[int, list[int]] = {}
    num_steps = 0

    def run_out(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps > 12 and inputs[0].shape[1] == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_pre_hook(run_out)
    done_before: list[int] = []

    def work(num_slots: int) -> None:
        done_before.append(len(answers))
        decode_in_slots(model, prompts, answers, STOPS, ignore_progress, num_slots)

    assert shrink_until_it_fits(work, 20, name="evaluation.batch_size") == 10
    assert answers == expected
    assert done_before[1] > 0
    assert "Out of memory: going on with evaluation.batch_size 10" in caplog.text


def test_padded_batches_that_do_not_fit_are_halved(caplog: pytest.LogCaptureFixture) -> None:
    model, prompts = build("falcon"), make_prompts(9, room=6)
    tokens = [list(prompt.tokens) for prompt in prompts]
    expected = generate_greedy(model, tokens, stop_ids=STOPS, max_new_tokens=6, batch_size=4)

    def run_out(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0].shape[0] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_input_embeddings().register_forward_pre_hook(run_out)
    assert generate_greedy(model, tokens, stop_ids=STOPS, max_new_tokens=6) == expected
    assert "going on with evaluation.batch_size 4" in caplog.text


def test_other_errors_and_a_size_that_cannot_be_halved_are_raised() -> None:
    sizes: list[int] = []

    def work(size: int) -> None:
        sizes.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory") if size else ValueError

    with pytest.raises(torch.OutOfMemoryError):
        shrink_until_it_fits(work, 5, name="size")
    assert sizes == [5, 2, 1]

    def fail(size: int) -> None:
        raise RuntimeError("a shape is wrong")

    with pytest.raises(RuntimeError, match="a shape is wrong"):
        shrink_until_it_fits(fail, 5, name="size")


def test_steps_are_recorded_for_few_lengths() -> None:
    assert [round_up(n) for n in (1, 64, 65, 96, 97, 128, 129, 193, 300, 1000)] == [
        64, 64, 96, 96, 128, 128, 192, 256, 384, 1024,
    ]  # fmt: skip
