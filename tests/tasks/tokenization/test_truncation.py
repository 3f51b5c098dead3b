from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.labels import Example
from tasks.tokenization.masking import MaskError, build_examples
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import say

HEADER = "<|im_end|>\n<|im_start|>assistant\n"


def said(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    return str(tokenizer.decode([label for label in example.labels if label != -100]))


def limit(max_length: int, **keys: Any) -> TokenizationConfig:
    return TokenizationConfig(max_length=max_length, **keys)


def test_the_question_is_cut_and_header_answer_and_end_of_turn_stay(chatml: PreTrainedTokenizerBase) -> None:
    (example,) = build_examples(say("u:" + "word " * 300, "a:Answer."), chatml, config=limit(100))
    text = str(chatml.decode(example.input_ids))
    assert 90 <= len(example.input_ids) <= 100
    assert example.truncated
    assert text.startswith("<|im_start|>user\nword word")
    assert text.endswith(HEADER + "Answer.<|im_end|>")
    assert said(chatml, example) == "Answer.<|im_end|>"


def test_the_longest_content_is_cut_first_and_the_system_message_last(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("s:Rules of the house.", "u:" + "long " * 200, "a:First.", "u:short", "a:Answer.")
    example = build_examples(messages, chatml, config=limit(150, train_on="last_turn"))[0]
    text = str(chatml.decode(example.input_ids))
    assert "Rules of the house." in text
    assert "First.<|im_end|>" in text
    assert "user\nshort" + HEADER in text


def test_turns_that_fit_stay_together_and_whole(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("u:q", "a:one", "u:" + "word " * 200, "a:two")
    whole, cut = build_examples(messages, chatml, config=limit(100))
    assert (said(chatml, whole), whole.truncated) == ("one<|im_end|>", False)
    assert (said(chatml, cut), cut.truncated) == ("two<|im_end|>", True)


def test_an_answer_that_is_too_long_is_rejected_by_default(chatml: PreTrainedTokenizerBase) -> None:
    with pytest.raises(MaskError, match=r"message 2: .*max_length = 64") as caught:
        build_examples(say("u:q", "a:" + "word " * 200), chatml, config=limit(64))
    assert caught.value.reason == "answer_too_long"


def test_a_cut_answer_keeps_its_end_of_turn(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("u:What?", "a:" + "床前明月光" * 100)
    (example,) = build_examples(messages, chatml, config=limit(64, truncation="cut_answer"))
    text = said(chatml, example)
    assert 60 <= len(example.input_ids) <= 64
    assert text.endswith("<|im_end|>")
    assert ("床前明月光" * 100).startswith(text.removesuffix("<|im_end|>"))
    assert example.truncated


@settings(max_examples=60, deadline=None)
@given(
    question=st.text(st.characters(exclude_categories=["Cs"]), max_size=400),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    max_length=st.integers(40, 300),
    truncation=st.sampled_from(["reject", "cut_answer"]),
)
def test_no_example_is_too_long_or_without_trained_tokens(
    chatml: PreTrainedTokenizerBase, question: str, answer: str, max_length: int, truncation: str
) -> None:
    config = limit(max_length, truncation=truncation)
    try:
        examples = build_examples(say("u:" + question, "a:" + answer), chatml, config=config)
    except MaskError as error:
        examples, reason = [], error.reason
    else:
        reason = "none"
    assert examples or reason in ("answer_too_long", "prompt_too_long")
    for example in examples:
        assert len(example.input_ids) == len(example.labels) <= max_length
        assert example.labels[-1] == chatml.convert_tokens_to_ids("<|im_end|>")
        if truncation == "reject":
            assert said(chatml, example) == answer + "<|im_end|>"


def test_what_just_fits_is_whole_and_what_is_one_token_longer_is_cut(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("u:" + "word " * 60, "a:Answer.")
    (whole,) = build_examples(messages, chatml, config=limit(1000))
    num_tokens = len(whole.input_ids)
    (fitting,) = build_examples(messages, chatml, config=limit(num_tokens))
    assert fitting == whole
    (cut,) = build_examples(messages, chatml, config=limit(num_tokens - 1))
    assert cut.truncated
    assert len(cut.input_ids) < num_tokens


def test_a_cut_answer_never_ends_within_a_character(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("u:What?", "a:" + "🙂" * 60)
    for max_length in range(40, 48):  # a character has four bytes, each a token
        (example,) = build_examples(messages, chatml, config=limit(max_length, truncation="cut_answer"))
        assert set(said(chatml, example).removesuffix("<|im_end|>")) == {"🙂"}


def test_an_example_of_its_own_counts_its_own_tokens_alone() -> None:
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", ""))  # without an end of turn each turn is an example
    messages = say("u:q", "a:one", "u:r", "a:two")
    longest = max(len(example.input_ids) for example in build_examples(messages, tokenizer))
    examples = build_examples(messages, tokenizer, config=limit(longest))
    assert [(example.turns, example.truncated) for example in examples] == [((1,), False), ((3,), False)]
