import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.labels import Example
from tasks.tokenization.masking import Conversation, Masked, MaskError, build_examples, build_many
from tests.tasks.tokenization import oracle
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import call, say

LONG = TokenizationConfig(max_length=100_000)


def said(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Decode what is trained."""
    return str(tokenizer.decode([label for label in example.labels if label != -100]))


def served(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> list[int]:
    """Return the ids of a served prompt."""
    ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return list(ids)


def judge(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], ending: str | None) -> oracle.Verdict:
    """Build and ask the oracle."""
    examples = build_examples(messages, tokenizer, config=LONG)
    return oracle.check(tokenizer, messages, None, [(e.input_ids, e.labels) for e in examples], ending)


def test_labels_are_the_answers_and_their_ends_of_turn_id_by_id(chatml: PreTrainedTokenizerBase) -> None:
    (example,) = build_examples(say("u:Hello", "a:Hi", "u:x", "a:y"), chatml)
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    first = chatml(text)["input_ids"]
    answer = chatml("Hi<|im_end|>")["input_ids"]
    between = chatml("\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    last = chatml("y<|im_end|>")["input_ids"]
    assert example.input_ids == first + answer + between + last
    assert example.labels == [-100] * len(first) + answer + [-100] * len(between) + last
    assert example.turns == (1, 3)


def test_the_prompt_is_the_served_one_and_nothing_follows_the_end_of_turn(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("s:Be brief.", "u:Why?", "a:Because.")
    (example,) = build_examples(messages, chatml)
    start = next(position for position, label in enumerate(example.labels) if label != -100)
    assert example.input_ids[:start] == served(chatml, messages[:2])
    assert example.input_ids[-1] == chatml.convert_tokens_to_ids("<|im_end|>")


def test_pad_equal_to_the_end_of_turn_still_learns_it() -> None:
    tokenizer = make_tokenizer(CHATML, pad="<|im_end|>")
    (example,) = build_examples(say("u:Hello", "a:Hi"), tokenizer)
    assert tokenizer.pad_token_id == example.labels[-1]


def test_last_turn_trains_the_last_answer_only(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("u:Hello", "a:Hi", "u:x", "a:y")
    (example,) = build_examples(messages, chatml, config=TokenizationConfig(train_on="last_turn"))
    assert said(chatml, example) == "y<|im_end|>"
    assert example.input_ids[: example.labels.index(example.labels[-1]) - 1] == served(chatml, messages[:3])


def test_train_false_is_context_only(chatml: PreTrainedTokenizerBase) -> None:
    messages = [*say("u:Hello", "a:Bad", train=False), *say("u:x", "a:Good")]
    (example,) = build_examples(messages, chatml)
    assert said(chatml, example) == "Good<|im_end|>"
    assert "Bad" in chatml.decode(example.input_ids)


def test_train_on_prompt_trains_every_token(chatml: PreTrainedTokenizerBase) -> None:
    (example,) = build_examples(say("u:Hello", "a:Hi"), chatml, config=TokenizationConfig(train_on_prompt=True))
    assert example.labels == example.input_ids


def test_answers_in_a_row_are_separate_turns(chatml: PreTrainedTokenizerBase) -> None:
    (example,) = build_examples(say("u:Tell", "a:One", "a:Two"), chatml)
    assert said(chatml, example) == "One<|im_end|>Two<|im_end|>"
    assert len(oracle.trained_runs(example.labels)) == 2


def test_an_answer_that_begins_with_a_line_end_merges_in_history_and_becomes_an_example_of_its_own() -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(["\n\n"])  # one token that spans header and answer
    messages = say("u:q", "a:\nanswer", "u:x", "a:y")
    examples = build_examples(messages, tokenizer)
    assert [said(tokenizer, example) for example in examples] == ["\nanswer<|im_end|>", "y<|im_end|>"]
    assert examples[1].input_ids[: len(served(tokenizer, messages[:3]))] == served(tokenizer, messages[:3])


def test_a_template_without_end_of_turn_gets_eos_and_an_example_a_turn() -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(template)
    examples = build_examples(say("u:q", "a:one", "u:r", "a:two"), tokenizer)
    assert [said(tokenizer, example) for example in examples] == ["one<|endoftext|>", "two<|endoftext|>"]
    assert [example.closed for example in examples] == [False, False]


def test_a_control_token_that_ends_an_answer_does_not_end_a_turn_that_the_template_leaves_open() -> None:
    tokenizer = make_tokenizer(CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content }}"))
    messages = say("u:q", "a:one<|im_end|>", "u:r", "a:two")
    config = TokenizationConfig(allow_special_tokens=True)
    first, second = build_examples(messages, tokenizer, config=config)
    assert said(tokenizer, first) == "one<|im_end|><|endoftext|>"
    assert said(tokenizer, second) == "two<|endoftext|>"
    assert second.input_ids[: len(served(tokenizer, messages[:3]))] == served(tokenizer, messages[:3])


def test_thoughts_that_history_drops_make_one_example_a_turn_each_in_its_served_context() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    messages = [*say("u:1", "a:2", reasoning_content="A"), *say("u:3", "a:4", reasoning_content="B")]
    examples = build_examples(messages, tokenizer)
    assert [said(tokenizer, example) for example in examples] == [
        "<think>A</think>2<|im_end|>",
        "<think>B</think>4<|im_end|>",
    ]
    assert "<think>" not in tokenizer.decode(served(tokenizer, messages[:3]))
    assert judge(tokenizer, messages, "<|im_end|>").kind == "kept"


def test_a_system_message_moved_into_the_last_question_is_trained_where_it_is_served() -> None:
    template = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}[Q]{{ system if loop.last }}{{ m.content }}[A]"
        "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(template)
    messages = say("s:SYS ", "u:q", "a:one", "u:r", "a:two")
    texts = [tokenizer.decode(example.input_ids) for example in build_examples(messages, tokenizer)]
    assert texts == ["[Q]SYS q[A] one<|im_end|>", "[Q]q[A] one<|im_end|>[Q]SYS r[A] two<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), say("u:q", "a:x"), "missing_reasoning"),
        (CHATML.replace("assistant\n", "assistant\nSure: "), say("u:q", "a:x"), "generation_prompt_mismatch"),
        ("{{ raise_exception('no') }}", say("u:q", "a:x"), "template_error"),
        (CHATML, say("a:x"), "no_prompt"),
        (CHATML, say("u:q"), "no_trained_tokens"),
        (CHATML, say("u:q", "a:x", train=False), "no_trained_tokens"),
        (CHATML, say("u:q", "a:x", train="no"), "bad_message"),
        (CHATML, say("u:q", "a:x", weight=0), "bad_message"),
        (CHATML, [{"content": "q"}], "bad_message"),
        (CHATML, [*say("u:q"), call({"city": "Rome"})], "dropped_tool_calls"),
        (CHATML, [*say("u:q"), {"role": "assistant", "content": None}], "null_content"),
        (None, say("u:q", "a:x"), "no_template"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_reason(template: str | None, messages: Any, reason: str) -> None:
    with pytest.raises(MaskError) as caught:
        build_examples(messages, make_tokenizer(template))
    assert caught.value.reason == reason
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, str(again)) == (reason, str(caught.value))


def test_text_that_spells_a_special_token_stays_text_and_is_counted(chatml: PreTrainedTokenizerBase) -> None:
    messages = say("u:<|im_end|> or <|im_start|>?", "a:It is <|im_end|>.")
    (outcome,) = build_many([Conversation(messages)], chatml, LONG)
    assert isinstance(outcome, Masked)
    (example,) = outcome.examples
    assert outcome.num_literals == 3
    end: Any = chatml.convert_tokens_to_ids("<|im_end|>")
    assert [example.input_ids.count(end), example.labels.count(end)] == [2, 1]
    assert said(chatml, example) == "It is <|im_end|>.<|im_end|>"
    assert judge(chatml, messages, "<|im_end|>").kind == "kept"


def test_special_tokens_in_contents_are_tokens_when_allowed(chatml: PreTrainedTokenizerBase) -> None:
    config = TokenizationConfig(allow_special_tokens=True)
    (example,) = build_examples(say("u:<|im_end|>", "a:x"), chatml, config=config)
    end: Any = chatml.convert_tokens_to_ids("<|im_end|>")
    assert example.input_ids.count(end) == 3


def test_bos_in_the_template_is_there_once_though_the_tokenizer_adds_it_too() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = make_tokenizer("{{ bos_token }}" + CHATML)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer("a")["input_ids"][0] == bos
    (example,) = build_examples(say("u:q", "a:x"), tokenizer)
    assert example.input_ids.count(bos) == 1


def test_the_tokenizer_is_not_changed(chatml: PreTrainedTokenizerBase) -> None:
    before = (len(chatml), chatml.chat_template, dict(chatml.special_tokens_map))
    build_examples(say("u:<|im_end|>", "a:x"), chatml)
    assert (len(chatml), chatml.chat_template, dict(chatml.special_tokens_map)) == before


SPACES = [" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u200b", "\ufeff", "\x00"]
WORDS = [
    "a",
    "Hello",
    "你好",
    "。",
    "🙂",
    "👩\u200d👩\u200d👧",
    "שלום",
    "مرحبا",
    "e\u0301",
    "▁",
    "\ufffd",
    "\ue000",
    '"',
    "\\",
]
MARKERS = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|endoftext|>",
    "<|pad|>",
    "</s>",
    "[/INST]",
    "<think>",
    "{% if %}",
]
BITS = st.sampled_from([*SPACES, *WORDS, *MARKERS])
CONTENTS = st.one_of(
    st.lists(BITS, min_size=1, max_size=8).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.sampled_from(["x" * 3000, "。"]),
)
TURNS = st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3)


def conversation(pairs: list[tuple[str, str]], system: str | None) -> list[dict[str, Any]]:
    """Lay questions and answers out as messages."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


@settings(max_examples=150, deadline=None)
@given(pairs=TURNS, system=st.one_of(st.none(), st.just(""), CONTENTS))
def test_the_law_holds_for_any_contents(
    chatml: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], system: str | None
) -> None:
    verdict = judge(chatml, conversation(pairs, system), "<|im_end|>")
    assert verdict == oracle.Verdict("kept")


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(st.tuples(TURNS, st.one_of(st.none(), CONTENTS)), min_size=1, max_size=6))
def test_a_batch_gives_what_each_conversation_gives(
    chatml: PreTrainedTokenizerBase, batch: list[tuple[list[tuple[str, str]], str | None]]
) -> None:
    conversations = [Conversation(conversation(pairs, system)) for pairs, system in batch]
    together = build_many(conversations, chatml, LONG)
    alone = [build_many([item], chatml, LONG)[0] for item in conversations]
    # Errors are equal where they say the same.
    assert [getattr(one, "args", one) for one in together] == [getattr(one, "args", one) for one in alone]
