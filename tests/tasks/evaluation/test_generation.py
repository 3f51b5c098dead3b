import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from tasks.evaluation.generation import decode, find_stop_ids, generate_greedy, render_questions
from tasks.evaluation.padded import pad_left
from tasks.models import load_model, load_tokenizer


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, 97) for _ in range(source.randrange(1, 30))] for _ in range(count)]


def greedy(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    stop_ids: frozenset[int] = frozenset(),
    max_new_tokens: int = 24,
    batch_size: int = 8,
) -> list[list[int]]:
    return generate_greedy(model, prompts, stop_ids=stop_ids, max_new_tokens=max_new_tokens, batch_size=batch_size)


def greedy_without_cache(model: PreTrainedModel, prompt: list[int], stop: frozenset[int], limit: int) -> list[int]:
    """The definition: run the whole sequence anew for every token, alone."""
    tokens: list[int] = []
    with torch.inference_mode():
        while len(tokens) < limit:
            best = int(model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].argmax())
            if best in stop:
                break
            tokens.append(best)
    return tokens


# A fifth of the vocabulary stops, so that rows leave the batch at different steps.
MANY_STOPS = frozenset(range(0, 97, 5))


@pytest.mark.parametrize("stops", [frozenset({2}), MANY_STOPS])
def test_batched_tokens_are_those_of_each_prompt_alone(model: PreTrainedModel, stops: frozenset[int]) -> None:
    prompts = make_prompts(23)
    expected = [greedy_without_cache(model, prompt, stops, 24) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > (5 if stops == MANY_STOPS else 0)
    for batch_size in (1, 4, 23):
        assert greedy(model, prompts, stop_ids=stops, batch_size=batch_size) == expected


def test_tokens_are_those_of_transformers_generate(model: PreTrainedModel) -> None:
    prompts = make_prompts(6, seed=1)
    input_ids, mask, _ = pad_left(prompts, torch.device("cpu"))
    generate: Any = model.generate
    whole = generate(input_ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = [row[: row.index(2)] if 2 in row else row for row in whole[:, input_ids.shape[1] :].tolist()]
    assert greedy(model, prompts, stop_ids=frozenset({2})) == expected


def test_the_generation_config_changes_nothing(model: PreTrainedModel) -> None:
    prompts = make_prompts(5)
    plain = greedy(model, prompts)
    config = model.generation_config
    assert config is not None
    config.do_sample, config.temperature, config.repetition_penalty = True, 2.0, 5.0
    config.suppress_tokens, config.max_length = [token for tokens in plain for token in tokens], 3
    assert greedy(model, prompts) == plain


def test_an_answer_that_stops_at_once_is_empty_and_keeps_its_place(model: PreTrainedModel) -> None:
    prompts = make_prompts(12)
    firsts = [tokens[0] for tokens in greedy(model, prompts, max_new_tokens=1)]
    stop = firsts[5]
    assert 0 < firsts.count(stop) < 12
    answers = greedy(model, prompts, stop_ids=frozenset({stop}), max_new_tokens=1)
    assert answers == [[] if first == stop else [first] for first in firsts]


def test_decoding_ends_at_the_end_of_the_context_row_by_row(model: PreTrainedModel) -> None:
    # The context is 128 tokens.
    answers = greedy(model, [[5] * 128, [5] * 120, [5] * 3], max_new_tokens=20)
    assert [len(tokens) for tokens in answers] == [0, 8, 20]


def test_learned_positions_count_from_the_first_token_behind_the_padding() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    prompts = make_prompts(7)
    expected = [greedy_without_cache(model, prompt, frozenset({2}), 12) for prompt in prompts]
    assert greedy(model, prompts, stop_ids=frozenset({2}), max_new_tokens=12, batch_size=7) == expected


STORIES = Path(__file__).resolve().parents[3] / ".." / "shared" / "material" / "models" / "stories260K"


@pytest.mark.skipif(not STORIES.exists(), reason="the model is not on this machine")
def test_a_trained_model_tells_the_same_stories_in_a_batch() -> None:
    model, tokenizer = load_model(STORIES, dtype=torch.float32), load_tokenizer(STORIES)
    beginnings = ["Once upon a time", "The dog", "Lily and Tom went to the park. They", "One day a big bear"]
    prompts = [tokenizer(text)["input_ids"] for text in beginnings]
    expected = [greedy_without_cache(model, prompt, frozenset({1, 2}), 60) for prompt in prompts]
    answers = greedy(model, prompts, stop_ids=frozenset({1, 2}), max_new_tokens=60)
    assert answers == expected
    assert all(len(answer) > 10 for answer in answers)


def test_left_padding_ends_every_row_in_the_last_column() -> None:
    input_ids, mask, positions = pad_left([[7, 8, 9], [5]], torch.device("cpu"))
    assert input_ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]


def test_every_prompt_is_reported_once(model: PreTrainedModel) -> None:
    reported: list[int] = []
    generate_greedy(
        model,
        make_prompts(10),
        stop_ids=frozenset(),
        max_new_tokens=2,
        batch_size=4,
        on_progress=reported.append,
    )
    assert reported == [4, 4, 2]


def test_stop_ids_are_every_eos_and_the_special_ends_of_the_references(tokenizer: PreTrainedTokenizerFast) -> None:
    configs = (GenerationConfig(eos_token_id=[2, 50]), GenerationConfig(eos_token_id=9), GenerationConfig(), None)
    # The second reference was cut and ends in the word "you" (7), which must not stop anything.
    assert find_stop_ids(configs, tokenizer, [[5, 4], [6, 7]]) == {1, 2, 50, 9, 4}


def test_questions_are_asked_with_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render_questions(["who are you ?"], tokenizer) == [[2, 5, 6, 7, 8, 4, 3]]
    # <|system|> is no word of this tokenizer: 0.
    assert render_questions(["who ?"], tokenizer, system="you") == [[0, 7, 4, 2, 5, 8, 4, 3]]
    assert decode(tokenizer, [7, 8, 4]) == "you ?"


def test_template_that_refuses_a_system_message_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    refuse = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refuse + str(tokenizer.chat_template)
    assert render_questions(["who ?"], tokenizer) == [[2, 5, 8, 4, 3]]
    with pytest.raises(ValueError, match=r"with evaluation.system_message before it \(no system role\)"):
        render_questions(["who ?"], tokenizer, system="you")


def test_questions_without_a_chat_template_are_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"evaluation\.questions.*model\.chat_template"):
        render_questions(["who?"], tokenizer)
    assert render_questions([], tokenizer) == []
