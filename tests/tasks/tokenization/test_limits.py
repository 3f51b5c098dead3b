"""A template that loops, swells, rewrites or never ends a turn is refused in seconds; others render as they did."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization import limits
from tasks.tokenization.examples import TokenizationError, tokenize_dataset
from tasks.tokenization.limits import TemplateLimitError
from tasks.tokenization.masking import MaskError, build_examples
from tasks.tokenization.rendering import open_chat, render
from tasks.tokenization.templates import TemplateError, prepare_tokenizer
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import CONVERSATIONS, say
from tests.tasks.tokenization.test_examples import write

_LONG = "{% set ns = namespace(t='abcdefgh', n=9) %}{% for n in range(99) %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}word{% endfor %}{% endfor %}",
    "a macro that calls itself": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "doubled by ~": _LONG + "{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "doubled by +": _LONG + "{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "repeated text": "{{ 'word' * 999999999 }}",
    "repeated list": "{{ ([1, 2] * 999999999) | length }}",
    "tower of powers": "{{ 9 ** 9 ** 9 ** 9 }}",
    "squared": _LONG + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 1.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_loops_or_swells_is_refused(tmp_path: Path, name: str) -> None:
    make_tokenizer(HOSTILE[name] + CHATML).save_pretrained(str(tmp_path))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"template") as caught:
        prepare_tokenizer(tmp_path, None)
    assert time.monotonic() - began < 10
    assert isinstance(caught.value, TemplateLimitError) or "RecursionError" in str(caught.value), caught.value


@pytest.mark.usefixtures("quick")
def test_a_template_that_loops_on_some_rows_ends_the_run_and_not_one_row_after_the_other(tmp_path: Path) -> None:
    loop = "{% if messages | length > 3 %}" + HOSTILE["nested loops"] + "{% endif %}"
    make_tokenizer(loop + CHATML).save_pretrained(str(tmp_path / "model"))
    prepared = prepare_tokenizer(tmp_path / "model", None)
    long = say("u:a", "a:b", "u:c", "a:d")
    dataset = write(tmp_path / "data", [long] * 50, [say("u:Hello", "a:Hi")])
    began = time.monotonic()
    with pytest.raises(
        TemplateLimitError, match=r"longer than 1 seconds for one conversation.*set model\.chat_template"
    ):
        tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())
    assert time.monotonic() - began < 10


def test_a_template_that_is_slow_on_every_row_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SLOW_SECONDS", 0.02)
    monkeypatch.setattr(limits, "MAX_SLOW_SECONDS", 1.0)
    slow = "{% for a in range(40) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    make_tokenizer("{% if messages | length > 3 %}" + slow + "{% endif %}" + CHATML).save_pretrained(tmp_path / "model")
    prepared = prepare_tokenizer(tmp_path / "model", None)
    rows = [say("u:a", "a:b", f"u:{n}", "a:d") for n in range(200)]
    dataset = write(tmp_path / "data", rows, [say("u:Hello", "a:Hi")])
    with pytest.raises(TemplateLimitError, match="again and again"):
        tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())


@pytest.mark.parametrize("text", ["{{ lipsum(9) }}", "{{ ['a', 'b'] | random }}"])
def test_what_writes_something_else_every_time_is_not_there(text: str) -> None:
    with pytest.raises(MaskError, match=r"lipsum|random"):
        render(open_chat(make_tokenizer(text + CHATML)), say("u:q"), None, add_generation_prompt=True)


@pytest.mark.usefixtures("quick")
def test_each_thread_has_its_own_time() -> None:
    chats = [open_chat(make_tokenizer(text + CHATML)) for text in ("", "{# another #}")]
    errors: list[Exception] = []

    def render_often(chat: Any) -> None:
        end = time.monotonic() + 2.5  # longer than one rendering may take
        try:
            while time.monotonic() < end:
                render(chat, say("u:q"), None, add_generation_prompt=True)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=render_often, args=(chat,)) for chat in chats]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_a_limited_template_writes_what_transformers_writes(chatml: PreTrainedTokenizerBase, shape: str) -> None:
    messages, tools = CONVERSATIONS[shape]
    extra = (
        "{{ 'a' ~ 1 ~ 'b' + 'c' * 3 }}{{ 2 ** 5 + 7 * 6 }}{% set x = [1] + [2] * 2 %}{{ x }}{{ [1, 2] | join('-') }}"
    )
    tokenizer = make_tokenizer(extra + CHATML.replace("{{ m.content }}", "{{ '' ~ m.content ~ '' }}"))
    chat = open_chat(tokenizer, tools)
    expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert render(chat, messages, tools, add_generation_prompt=True) == expected
    assert expected.startswith("a1bccc74[1, 2, 2]1-2")


@pytest.mark.parametrize(
    ("change", "who"),
    [
        ("m.content | upper", "user"),
        ("m.content | e", "user"),
        ("m.content | truncate(400)", "user"),
        ("m.content.replace('  ', ' ')", "user"),
        ("m.content | replace('0', 'O')", "user"),
        ("(m.content | title) if m.role == 'assistant' else m.content", "assistant"),
        ("m.content[:200] if m.role == 'assistant' else m.content", "assistant"),
        ("'I do not know' if m.role == 'assistant' else m.content", "assistant"),
    ],
)
def test_a_template_that_rewrites_contents_is_refused(tmp_path: Path, change: str, who: str) -> None:
    make_tokenizer(CHATML.replace("m.content", change)).save_pretrained(str(tmp_path))
    with pytest.raises(TemplateError, match=f"does not write what the {who} says as it is.*set model.chat_template"):
        prepare_tokenizer(tmp_path, None)


@pytest.mark.parametrize("text", ["{{ '%99999d' % 1 }}", "{{ 'x'.center(10 ** 7) }}", "{{ 'word ' * 30000 }}"])
def test_a_template_that_writes_far_more_than_the_messages_is_refused(tmp_path: Path, text: str) -> None:
    make_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content }}" + text)).save_pretrained(str(tmp_path))
    with pytest.raises(TemplateError, match=r"characters around two messages, more than 100,000"):
        prepare_tokenizer(tmp_path, None)


def test_outer_spaces_are_no_rewriting(tmp_path: Path) -> None:
    make_tokenizer(CHATML.replace("m.content", "m.content | trim")).save_pretrained(str(tmp_path))
    assert prepare_tokenizer(tmp_path, None).end_of_turn == "<|im_end|>"


def test_a_template_whose_turns_never_end_a_generation_is_refused(tmp_path: Path) -> None:
    # It wants a system message, so that a probe without one does not tell how its turns end.
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    make_tokenizer(strict + CHATML).save_pretrained(str(tmp_path / "model"))
    prepared = prepare_tokenizer(tmp_path / "model", None)
    rows = [say("s:Be brief.", "u:Why?", "a:Because.")]
    dataset = write(tmp_path / "data", rows * 3, rows)
    with pytest.raises(TokenizationError, match="none of 3 training examples ends in a token that ends a generation"):
        tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())


def test_a_conversation_of_thousands_of_messages_is_refused_at_once_or_quick(chatml: PreTrainedTokenizerBase) -> None:
    turns = say(*(f"{'ua'[number % 2]}:word {number}" for number in range(2000)))
    config = TokenizationConfig(max_length=100_000)
    began = time.monotonic()
    with pytest.raises(MaskError, match=r"set tokenization\.train_on to last_turn") as caught:
        build_examples(turns, chatml, config=config)
    assert caught.value.reason == "too_many_turns"
    (example,) = build_examples(turns, chatml, config=config.model_copy(update={"train_on": "last_turn"}))
    assert example.turns == (1999,)
    assert time.monotonic() - began < 5


def test_as_many_prompt_messages_as_are_allowed_are_trained(
    chatml: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = say("u:a", "a:b", "u:c", "a:d")  # the prompts have 1 and 3 messages
    monkeypatch.setattr("tasks.tokenization.masking.MOST_PROMPT_MESSAGES", 4)
    assert build_examples(turns, chatml)[0].turns == (1, 3)
    monkeypatch.setattr("tasks.tokenization.masking.MOST_PROMPT_MESSAGES", 3)
    with pytest.raises(MaskError, match="4 messages together, more than 3"):
        build_examples(turns, chatml)
