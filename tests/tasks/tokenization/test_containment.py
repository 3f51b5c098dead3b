"""What a template loses of a row is a reject with its reason, or a loss that the config allows and that is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.config import TokenizationConfig
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.masking import Conversation, Masked, MaskError, build_examples, build_many
from tasks.tokenization.templates import prepare_tokenizer
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import TOOLS, call, say
from tests.tasks.tokenization.test_examples import write

TURN = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOL_LIST = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"


def loop(body: str, *, front: str = "") -> str:
    """A template that writes each message by a body."""
    return front + "{% for m in messages %}" + body + "{% endfor %}" + PROMPT


NO_SYSTEM = loop("{% if m.role != 'system' %}" + TURN + "{{ m.content }}<|im_end|>\n{% endif %}")
CALL_ONLY = loop(
    TURN
    + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n",
    front=TOOL_LIST,
)
NO_ARGUMENTS = loop(
    TURN + "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}<|im_end|>\n",
    front=TOOL_LIST,
)
CUT_THOUGHT = loop(TURN + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n")
NO_THIRD = loop("{% if loop.index0 != 2 %}" + TURN + "{{ m.content }}<|im_end|>\n{% endif %}")
ALL_CALLS = loop(TURN + "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n", front=TOOL_LIST)
NO_TOOL_RESULT = ALL_CALLS.replace("<|im_start|>", "{% if m.role != 'tool' %}<|im_start|>", 1).replace(
    "<|im_end|>\n", "<|im_end|>\n{% endif %}", 1
)
CALLED = [*say("u:Weather in Rome?"), call({"city": "Rome"})]
USER = (None, "user")
EARLIER = say("u:And now?", "a:z", train=False)
RESULT = {"role": "tool", "content": "21 degrees", "name": "weather"}

LOST: dict[str, tuple[str, list[dict[str, Any]], Any, str]] = {
    "the system message": (NO_SYSTEM, say("s:Be brief.", "u:Why?", "a:Because."), None, "system"),
    "a system message whose word is in every header": (NO_SYSTEM, say("s:user", "u:Why?", "a:So."), None, "system"),
    "a system message that the question holds": (NO_SYSTEM, say("s:Be so.", "u:Be so. Why?", "a:No."), None, "system"),
    "the text beside a tool call": (CALL_ONLY, [*say("u:q"), call({"city": "Rome"}, "I look.")], TOOLS, "answer"),
    "the arguments of a call": (NO_ARGUMENTS, CALLED, TOOLS, "tool_calls"),
    "a whole call": (CHATML, [*say("u:q"), call({"city": "Rome"}, "x")], None, "tool_calls"),
    "the tools": (CHATML, say("u:Weather?", "a:Fine."), TOOLS, "tools"),
    "a tool's name that only the question has": (CHATML, say("u:The weather?", "a:Fine."), TOOLS, "tools"),
    "reasoning": (CHATML, say("u:2 + 2?", "a:4", reasoning_content="Add."), None, "reasoning"),
    "a thought in the text": (CUT_THOUGHT, say("u:q", "a:<think>Add.</think>4"), None, "reasoning"),
    "an earlier question": (
        NO_THIRD,
        [*EARLIER, *say("u:first", "a:x", train=False), *say("u:q", "a:y")],
        None,
        "user",
    ),
    "one of two questions of the same words": (
        NO_THIRD,
        [*EARLIER, *say("u:And now?", "a:x", train=False), *say("u:q", "a:y")],
        None,
        "user",
    ),
    "a tool's result": (NO_TOOL_RESULT, [*CALLED, RESULT, *say("a:Warm.")], TOOLS, "tool"),
    "an earlier call whose words all stand elsewhere": (
        ALL_CALLS.replace("if m.tool_calls", "if m.tool_calls and loop.last", 1),
        [*say("u:Weather in Rome?"), call({"city": "Rome"}, "I look."), RESULT, *say("a:Warm in Rome.")],
        TOOLS,
        "history_tool_calls",
    ),
    "an earlier answer": (
        loop("{% if m.role == 'user' or loop.last %}" + TURN + "{{ m.content }}<|im_end|>\n{% endif %}"),
        [*say("u:a", "a:Earlier words.", train=False), *say("u:b", "a:Later.")],
        None,
        "history",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_template_loses_is_a_reject_by_its_name_with_a_way_out_that_works(name: str) -> None:
    template, messages, tools, loss = LOST[name]
    tokenizer = make_tokenizer(template)
    with pytest.raises(MaskError, match=r"tokenization\.allow_dropped") as caught:
        build_examples(messages, tokenizer, tools=tools)
    assert caught.value.reason == f"dropped_{loss}"
    # What the message advises is followed, again and again where more is lost, and the conversation is kept.
    for _ in range(4):
        allowed = json.loads(str(caught.value).rpartition("allow_dropped: ")[2])
        config = TokenizationConfig(allow_dropped=allowed)
        (outcome,) = build_many([Conversation(messages, tools)], tokenizer, config)
        if isinstance(outcome, Masked):
            break
        caught.value.args = outcome.args
    assert isinstance(outcome, Masked)
    assert loss in outcome.dropped


def test_an_answer_of_which_nothing_is_left_is_never_trained() -> None:
    template = loop(TURN + "{{ m.content if m.role == 'user' }}<|im_end|>\n")
    with pytest.raises(MaskError) as caught:
        build_examples(
            say("u:q", "a:Hello"), make_tokenizer(template), config=TokenizationConfig(allow_dropped=("answer",))
        )
    assert caught.value.reason == "empty_answer"


def test_where_nothing_is_left_of_a_call_no_loss_can_be_allowed_and_the_advice_works() -> None:
    tokenizer = make_tokenizer(loop(TURN + "{{ m.content }}<|im_end|>\n", front=TOOL_LIST))
    with pytest.raises(MaskError, match="such as chatml") as caught:
        build_examples(CALLED, tokenizer, tools=TOOLS)
    assert caught.value.reason == "dropped_tool_calls"
    assert "allow_dropped" not in str(caught.value)
    tokenizer.chat_template = (Path(prepare_tokenizer.__code__.co_filename).parent / "chatml.jinja").read_text("utf-8")
    assert build_examples(CALLED, tokenizer, tools=TOOLS)


def test_all_that_a_template_loses_of_a_row_is_named_at_once() -> None:
    messages = [*say("s:Be brief.", "u:q"), call({"city": "Rome"}, "I look.")]
    with pytest.raises(MaskError) as caught:
        build_examples(messages, make_tokenizer(NO_SYSTEM), tools=TOOLS)
    assert "leaves out the definitions of the tools and the system message and its tool call or" in str(caught.value)
    assert str(caught.value).endswith('allow_dropped: ["history_reasoning", "tools", "system", "tool_calls"]')


KEPT: dict[str, tuple[str, list[dict[str, Any]], Any]] = {
    "trimmed": (loop(TURN + "{{ m.content | trim }}<|im_end|>\n"), say("u: q \n", "a:\n x "), None),
    "as JSON text": (
        loop(TURN + "{{ m.content | tojson if m.role == 'user' else m.content }}<|im_end|>\n"),
        say('u:say "é"\n', 'a:"é"\n!'),
        None,
    ),
    "arguments as text": (ALL_CALLS, [*say("u:q"), call('{"city": "Rom\\u00e9"}')], TOOLS),
    "thought written apart": (
        loop(TURN + "{% set p = m.content.split('</think>') %}{{ p[0] }}</think>\n\n{{ p[-1] | trim }}<|im_end|>\n"),
        say("u:q", "a:<think>\nAdd.\n</think>\n4"),
        None,
    ),
    "no words beside an earlier call": (
        CALL_ONLY,
        [*CALLED, RESULT, *say("a:Warm."), {**CALLED[-1], "content": None, "train": False}, RESULT, *say("a:Still.")],
        TOOLS,
    ),
    "words of every header": (CHATML, say("s:system", "u:user", "a:assistant", "u:user", "a:x"), None),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_written_in_another_form_is_not_lost(name: str) -> None:
    template, messages, tools = KEPT[name]
    (outcome,) = build_many([Conversation(messages, tools)], make_tokenizer(template), TokenizationConfig())
    assert isinstance(outcome, Masked), outcome
    assert outcome.dropped == ()


def test_reasoning_of_earlier_answers_may_be_lost_and_is_counted() -> None:
    template = loop(
        TURN + "{% if m.role == 'assistant' and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>\n"
    )
    messages = [*say("u:1", "a:2", reasoning_content="First."), *say("u:3", "a:4", reasoning_content="Second.")]
    (outcome,) = build_many([Conversation(messages)], make_tokenizer(template), TokenizationConfig())
    assert isinstance(outcome, Masked)
    assert outcome.dropped == ("history_reasoning",)
    with pytest.raises(MaskError) as caught:
        build_examples(messages, make_tokenizer(template), config=TokenizationConfig(allow_dropped=()))
    assert caught.value.reason == "dropped_history_reasoning"


def test_losses_and_spelled_ends_are_counted_in_masks_json_and_named_as_warnings(tmp_path: Path) -> None:
    make_tokenizer(NO_SYSTEM).save_pretrained(str(tmp_path / "model"))
    prepared = prepare_tokenizer(tmp_path / "model", None)
    rows = [say("s:Be brief.", "u:Why?", f"a:Because {n}.<|endoftext|>\n") for n in range(3)]
    dataset = write(tmp_path / "data", [*rows, say("u:q", "a:x")], [say("u:q", "a:x")])
    config = TokenizationConfig(allow_dropped=("system",))
    counts = tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    masks = json.loads((tmp_path / "tokens" / "masks.json").read_text(encoding="utf-8"))["train"]
    assert masks["dropped_by_template"] == {"system": 3}
    assert masks["literal_endings"] == {"<|endoftext|>": 3}
    named = " ".join(counts.warnings)
    assert "training rows: the chat template leaves out the system message 3 times" in named
    assert "3 answers end in the text '<|endoftext|>'" in named
    refused = tokenize_dataset(dataset, prepared, tmp_path / "refused", TokenizationConfig())
    assert refused.rows_rejected == {"dropped_system": 3}
