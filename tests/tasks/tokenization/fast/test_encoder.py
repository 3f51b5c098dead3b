"""Assembled conversations are the rendered ones, id by id; what cannot be shown to be is not assembled."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.fast.encoder import open_fast
from tasks.tokenization.groups import Fast
from tasks.tokenization.masking import Conversation, Masked, build_many
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import CONVERSATIONS, say
from tests.tasks.tokenization.material import TEMPLATES, TOKENIZERS, dress, load
from tests.tasks.tokenization.own import make
from tests.tasks.tokenization.test_masking import CONTENTS, TURNS, conversation

LONG = TokenizationConfig(max_length=100_000)
# Of the borrowed tokenizers those that encode words apart; the others' conversations are all rendered.
BY_WORDS = ("gpt2", "minimind", "qwen2.5-base", "qwen2.5-instruct", "smollm2-135m-instruct")
# Their answers do not follow from the contents by joining, trimming and asking alone.
NEVER = ("trl__deepseekv3", "trl__diffusion_gemma", "trl__nemotron")
needs_material = pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="borrowed tokenizers are not here")


class Opened:
    """A tokenizer's fast way, beside the way that it has to agree with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TokenizationConfig = LONG) -> None:
        fast = open_fast(tokenizer, config)
        assert fast is not None
        self.fast: Fast = fast
        self.tokenizer, self.config = tokenizer, config

    def compare(self, messages: list[dict[str, Any]]) -> bool:
        """Assert that what is assembled is what rendering gives; tell whether anything was."""
        item = Conversation(messages)
        examples = self.fast(item)
        if examples is None:
            return False
        (outcome,) = build_many([item], self.tokenizer, self.config)
        assert isinstance(outcome, Masked), outcome
        assert (outcome.num_literals, outcome.dropped) == (0, ())
        assert examples == outcome.examples
        return True


def compare_any(opened: Opened, num_examples: int) -> float:
    """Compare conversations of all kinds; return the share that was assembled, of those that should be.

    A conversation should be when its contents are the plain words below: they hold no added token, and are in the
    normal form of Unicode.
    """
    plain = st.lists(st.sampled_from(["a", " word", "\n", "你好", "42", ".", "  ", "é"]), min_size=1).map("".join)
    made: list[bool] = []

    @settings(max_examples=num_examples, deadline=None)
    @given(pairs=TURNS, system=st.one_of(st.none(), st.just(""), CONTENTS))
    def hold(pairs: list[tuple[str, str]], system: str | None) -> None:
        opened.compare(conversation(pairs, system))

    @settings(max_examples=num_examples, deadline=None)
    @given(pairs=st.lists(st.tuples(plain, plain.map(lambda text: f"x{text}x")), min_size=1, max_size=3))
    def hold_plain(pairs: list[tuple[str, str]]) -> None:
        made.append(opened.compare(conversation(pairs, None)))

    hold()
    hold_plain()
    return sum(made) / len(made)


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened(make_tokenizer(CHATML))


def test_an_ordinary_conversation_is_assembled_id_by_id(opened: Opened) -> None:
    examples = opened.fast(Conversation(say("u:Hello", "a:Hi")))
    assert examples is not None
    (example,) = examples
    tokenizer = opened.tokenizer
    front = tokenizer("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    answer = tokenizer("Hi<|im_end|>")["input_ids"]
    assert example.input_ids == front + answer
    assert example.labels == [-100] * len(front) + answer
    assert (example.turns, example.target) == ((1,), "Hi<|im_end|>")


def test_any_contents_are_assembled_as_rendered_or_not_at_all_and_plain_ones_always(opened: Opened) -> None:
    assert compare_any(opened, 150) == 1.0


@pytest.mark.parametrize("train_on", ["all_turns", "last_turn"])
@pytest.mark.parametrize("train_on_prompt", [False, True])
def test_what_is_trained_is_as_asked(train_on: Any, train_on_prompt: bool) -> None:
    config = TokenizationConfig(train_on=train_on, train_on_prompt=train_on_prompt)
    opened = Opened(make_tokenizer(CHATML), config)
    assert opened.compare(say("s:Be brief.", "u:Why?", "a:Because.", "u:And?", "a:So."))


@pytest.mark.parametrize(
    "messages",
    [
        say("u:<|im_end|>", "a:x"),
        say("u:q", "a:x", train=False),
        say("u:q", "a:" + "long " * 3000),
        say("u:q"),
        [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
        [{"role": "developer", "content": "Be brief."}, *say("u:q", "a:x")],  # is rendered as a system message
    ],
)
def test_what_needs_a_closer_look_is_left_to_rendering(messages: list[dict[str, Any]]) -> None:
    opened = Opened(make_tokenizer(CHATML), TokenizationConfig())
    assert opened.fast(Conversation(messages)) is None


def test_constants_that_an_added_token_could_begin_or_end_in_are_left_to_rendering() -> None:
    begins = Opened(make_tokenizer(CHATML.replace("{{ m.content }}", "<|im_{{ m.content }}")))
    assert begins.fast(Conversation(say("u:end|>", "a:x"))) is None
    ends = Opened(make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }}_end|>")))
    assert ends.fast(Conversation(say("u:<|im", "a:x"))) is None


@pytest.mark.parametrize("reach", ["rstrip", "single_word"])
def test_an_added_token_that_depends_on_what_is_beside_it_is_left_to_rendering(reach: str) -> None:
    template = CHATML.replace("{{ m.role }}\n", "{{ m.role }}<|sep|>").replace("assistant\n", "assistant<|sep|>")
    tokenizer = make_tokenizer(template)
    tokenizer.add_tokens([AddedToken("<|sep|>", normalized=False, **{reach: True})])
    assert Opened(tokenizer).fast(Conversation(say("u: q", "a:x"))) is None


def test_characters_that_compose_with_one_another_are_left_to_rendering() -> None:
    opened = Opened(make("composed bytes", "chatml"))
    assert opened.compare(say("u:\u1100", "a:\u1161"))  # two halves of a Korean syllable, each alone
    assert opened.fast(Conversation(say("u:\u1100\u1161", "a:x"))) is None


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
    opened = Opened(make_tokenizer(CHATML.replace("{{ m.content }}", "{{ " + expression + " }}")))
    assert opened.fast(Conversation(say("u:abc", "a:abc"))) is None


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
    opened = Opened(make_tokenizer(CHATML.replace("{{ m.content }}", "{{ " + expression + " }}")))
    contents = ["abc", "x", " x ", "\nabc\n", "x|y", "axb", "", "abc", "x"]
    assembled = [opened.compare(say(f"u:{a}", f"a:{b}")) for a in contents for b in contents]
    assert sum(assembled) >= 20


def test_a_template_that_cuts_more_than_spaces_is_not_trusted_though_nothing_of_these_contents_is_cut() -> None:
    opened = Opened(make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content.strip('xy') }}")))
    assert not opened.compare(say("u:abc", "a:abc"))
    assert opened.fast(Conversation(say("u:xb", "a:yb"))) is None


@needs_material
@pytest.mark.parametrize("name", BY_WORDS)
def test_borrowed_tokenizers_give_the_same_word_by_word(name: str) -> None:
    tokenizer = load(name)
    tokenizer.chat_template = tokenizer.chat_template or CHATML.replace("<|im_end|>", "<|endoftext|>")
    opened = Opened(tokenizer)
    assert compare_any(opened, 60) == 1.0
    assert opened.compare(say("u:Hello, how are you?", "a:I'm fine,  thanks!\n\n1234 é 你好 🙂"))


@pytest.fixture(scope="module")
def carrier() -> PreTrainedTokenizerBase:
    return load("minimind")


@needs_material
@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_borrowed_templates_are_assembled_as_rendered(carrier: PreTrainedTokenizerBase, template: str) -> None:
    opened = Opened(dress(carrier, template))
    made = [opened.compare(messages) for messages, tools in CONVERSATIONS.values() if tools is None]
    share = compare_any(opened, 15)
    never = template == "trl__glm4moe" or template.startswith(NEVER)
    assert (any(made), share) == ((False, 0.0) if never else (True, 1.0))
