"""Assembled conversations are the rendered ones, id by id; what cannot be shown to be is not assembled."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.fast.assembly import Assembler, open_assembler
from tasks.tokenization.masking import Conversation, Masked, build_many
from tasks.tokenization.tables import Row, to_line
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import CONVERSATIONS, say
from tests.tasks.tokenization.material import TEMPLATES, TOKENIZERS, dress, load
from tests.tasks.tokenization.test_masking import CONTENTS, TURNS, conversation

LONG = TokenizationConfig(max_length=100_000)
# Of the borrowed tokenizers those that encode words apart; the others' conversations are all rendered.
BY_WORDS = ("gpt2", "minimind", "qwen2.5-base", "qwen2.5-instruct", "smollm2-135m-instruct")
needs_material = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="borrowed tokenizers are not here")


def compare(assembler: Assembler, messages: list[dict[str, Any]], config: TokenizationConfig = LONG) -> bool:
    """Assert that what is assembled is what rendering gives; tell whether anything was."""
    item = Conversation(messages)
    lines = assembler.assemble(item)
    if lines is None:
        return False
    tokenizer = assembler.chat.tokenizer
    (outcome,) = build_many([item], tokenizer, config)
    assert isinstance(outcome, Masked), outcome
    assert (outcome.num_literals, outcome.dropped) == (0, ())
    row = Row("id", "data.jsonl", 1, "", item)
    end = assembler.chat.ending.kept
    assert [line.normal() for line in lines] == [to_line(row, example, end).normal() for example in outcome.examples]
    return True


@pytest.fixture(scope="module")
def assembler() -> Assembler:
    opened = open_assembler(make_tokenizer(CHATML), LONG)
    assert opened is not None
    return opened


def test_an_ordinary_conversation_is_assembled_id_by_id(assembler: Assembler) -> None:
    lines = assembler.assemble(Conversation(say("u:Hello", "a:Hi")))
    assert lines is not None
    (line,) = lines
    tokenizer = assembler.chat.tokenizer
    front = tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("Hi<|im_end|>")["input_ids"]
    assert (list(memoryview(line.ids).cast("i")), line.runs) == (front + answer, [len(front), len(answer)])
    assert (line.question, line.reference) == ("Hello", "Hi")


@settings(max_examples=150, deadline=None)
@given(pairs=TURNS, system=st.one_of(st.none(), st.just(""), CONTENTS))
def test_any_contents_are_assembled_as_rendered_or_not_at_all(
    assembler: Assembler, pairs: list[tuple[str, str]], system: str | None
) -> None:
    compare(assembler, conversation(pairs, system))


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_what_is_trained_is_as_asked(train_on: Any, train_on_prompt: bool) -> None:
    config = TokenizationConfig(train_on=train_on, train_on_prompt=train_on_prompt)
    opened = open_assembler(make_tokenizer(CHATML), config)
    assert opened is not None
    assert compare(opened, say("s:Be brief.", "u:Why?", "a:Because.", "u:And?", "a:So."), config)


@pytest.mark.parametrize(
    "messages",
    [
        say("u:<|im_end|>", "a:x"),
        say("u:q", "a:x", train=False),
        say("u:q", "a:" + "long " * 3000),
        say("u:q"),
        [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
    ],
)
def test_what_needs_a_closer_look_is_left_to_rendering(messages: list[dict[str, Any]]) -> None:
    opened = open_assembler(make_tokenizer(CHATML), TokenizationConfig())
    assert opened is not None
    assert opened.assemble(Conversation(messages)) is None


# What a template may do to a content beyond writing it; each has to be noticed.
READING = [
    "m.content | length",
    "m.content[0]",
    "m.content[:3]",
    "m.content | upper",
    "m.content | tojson",
    "m.content | replace('a', 'b')",
    "m.content | wordcount",
    "m.content | int",
    "m.content | join",
    "m.content | list | length",
    "m.content.index('x')",
    "m.content.find('x')",
    "'%s' % m.content",
    "'{}'.format(m.content)",
    "(m.content in 'abc') | string",
    "(m.content is lower) | string",
    "(m.content > 'b') | string",
    "{m.content: 1} | length",
    "('x' ~ m.content) | trim",
    "m | tojson",
    "[m.content, 'a'] | sort | first",
    "[m.content, 'a'] | unique | list | length",
    "'abc'.replace(m.content, '')",
    "'abc'.startswith(m.content) | string",
    "m.content * 2",
]


@pytest.mark.parametrize("expression", READING)
def test_a_template_that_reads_contents_is_not_trusted(expression: str) -> None:
    opened = open_assembler(make_tokenizer(CHATML.replace("{{ m.content }}", "{{ " + expression + " }}")), LONG)
    assert opened is not None
    assert opened.assemble(Conversation(say("u:abc", "a:abc"))) is None


# What is answered for the contents at hand and asked again of the next ones.
ASKING = [
    "m.content | trim",
    "m.content.strip('\\n')",
    "m.content.rstrip()",
    "'yes' if m.content else 'no' }}{{ m.content",
    "'yes' if 'x' in m.content else 'no' }}{{ m.content",
    "'yes' if m.content.startswith('x') else 'no' }}{{ m.content",
    "'yes' if m.content == 'x' else 'no' }}{{ m.content",
    "m.content.split('|')[-1]",
    "(m.role ~ m.content) if m.content is string else 'list'",
    "('x' in m.content) | string }}{{ m.content",
]


@pytest.mark.parametrize("expression", ASKING)
def test_what_a_template_asks_of_contents_is_asked_of_each(expression: str) -> None:
    opened = open_assembler(make_tokenizer(CHATML.replace("{{ m.content }}", "{{ " + expression + " }}")), LONG)
    assert opened is not None
    contents = ["abc", "x", " x ", "\nabc\n", "x|y", "axb", "", "abc", "x"]
    assembled = [compare(opened, say(f"u:{a}", f"a:{b}")) for a in contents for b in contents]
    assert sum(assembled) >= 20


@needs_material
@pytest.mark.parametrize("name", BY_WORDS)
def test_borrowed_tokenizers_give_the_same_word_by_word(name: str) -> None:
    tokenizer = load(name)
    tokenizer.chat_template = tokenizer.chat_template or CHATML.replace("<|im_end|>", "<|endoftext|>")
    opened = open_assembler(tokenizer, LONG)
    assert opened is not None

    @settings(max_examples=60, deadline=None)
    @given(pairs=TURNS, system=st.one_of(st.none(), CONTENTS))
    def hold(pairs: list[tuple[str, str]], system: str | None) -> None:
        compare(opened, conversation(pairs, system))

    hold()
    assert compare(opened, say("u:Hello, how are you?", "a:I'm fine,  thanks!\n\n1234 é 你好 🙂"))


@pytest.fixture(scope="module")
def carrier() -> PreTrainedTokenizerBase:
    return load("minimind")


@needs_material
@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_borrowed_templates_are_assembled_as_rendered(carrier: PreTrainedTokenizerBase, template: str) -> None:
    opened = open_assembler(dress(carrier, template), LONG)
    assert opened is not None
    for messages, tools in CONVERSATIONS.values():
        if tools is None:
            compare(opened, messages)

    @settings(max_examples=15, deadline=None)
    @given(pairs=TURNS, system=st.one_of(st.none(), CONTENTS))
    def hold(pairs: list[tuple[str, str]], system: str | None) -> None:
        compare(opened, conversation(pairs, system))

    hold()
