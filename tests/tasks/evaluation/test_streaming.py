"""An answer that is shown while it is made is the answer that evaluation measures."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tasks.evaluation.generation import generate_greedy
from tasks.evaluation.streaming import stream_text, stream_tokens

_PROMPT = [5, 9, 33, 7]


def test_greedy_tokens_are_those_of_the_evaluation(model: PreTrainedModel) -> None:
    stop = frozenset({2})
    expected = generate_greedy(model, [_PROMPT], stop_ids=stop, max_new_tokens=20, batch_size=1)[0]
    assert list(stream_tokens(model, _PROMPT, stop_ids=stop, max_new_tokens=20)) == expected
    assert len(expected) > 3
    first = expected[2]
    cut = list(stream_tokens(model, _PROMPT, stop_ids=frozenset({first}), max_new_tokens=20))
    assert cut == expected[: expected.index(first)]


def test_a_drawn_answer_is_repeated_by_its_seed_and_a_cold_one_is_the_greedy_one(model: PreTrainedModel) -> None:
    def draw(temperature: float, seed: int) -> list[int]:
        source = torch.Generator().manual_seed(seed)
        tokens = stream_tokens(
            model, _PROMPT, stop_ids=frozenset(), max_new_tokens=20, temperature=temperature, generator=source
        )
        return list(tokens)

    assert draw(5.0, 1) == draw(5.0, 1)
    assert draw(5.0, 1) != draw(5.0, 2)
    greedy = generate_greedy(model, [_PROMPT], stop_ids=frozenset(), max_new_tokens=20, batch_size=1)[0]
    assert draw(1e-4, 3) == greedy


def test_the_answer_ends_where_the_context_does(model: PreTrainedModel) -> None:
    prompt = [7] * 125
    assert len(list(stream_tokens(model, prompt, stop_ids=frozenset(), max_new_tokens=20))) == 3


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("text", ["plain words", "瓦耳花 and 🙂🙂", " two  spaces \n", ""])
def test_pieces_are_whole_characters_and_together_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces = list(stream_text(iter(tokenizer.encode(text)), tokenizer))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_bytes_that_make_no_character_are_shown_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = tokenizer.encode("a瓦")[:-1]
    assert list(stream_text(iter(cut), tokenizer)) == ["a", "\N{REPLACEMENT CHARACTER}"]
