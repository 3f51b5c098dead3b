"""What a template writes for calls of tools is read back, in each of the forms in which templates write them."""

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tasks.serving.call_syntax import CallSyntax, JsonCalls, MarkedCalls, NamedCalls, Render, learn_syntax

_ASK = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
)
_END = "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
_EACH = "{% for c in m.tool_calls or [] %}"
_HERMES = (
    _EACH
    + '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    + "</tool_call>{% endfor %}"
)
_LLAMA = (
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ fail() }}{% endif %}{% set c = m.tool_calls[0] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endif %}'
)
_LISTED = (
    "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "{% if not loop.last %}, {% endif %}"
    "{% endfor %}]{% endif %}"
)
_NAMED = _EACH + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
_MARKED = (
    _EACH + "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
    "<parameter={{ k }}>\n{{ v if v is string else (v | tojson if v is mapping else v) }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>\n{% endfor %}"
)
_WITHOUT_ARGUMENTS = _EACH + "<call>{{ c.function.name }}</call>{% endfor %}"


def _render(calls: str) -> Render:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_ASK + calls + _END)

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]], with_prompt: bool) -> str:
        return template.render(messages=messages, tools=tools, add_generation_prompt=with_prompt)

    return render


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        (_HERMES, JsonCalls("<tool_call>", "name", "arguments")),
        (_LLAMA, JsonCalls("", "name", "parameters")),
        (_LISTED, JsonCalls("[TOOL_CALLS]", "name", "arguments")),
        (_NAMED, NamedCalls("[TOOL_CALLS]", "[TOOL_CALLS]", "[ARGS]")),
        (_MARKED, MarkedCalls("<tool_call>\n<function=", ">", "<parameter=", ">", "</parameter>")),
        (_WITHOUT_ARGUMENTS, None),
        ("", None),
    ],
)
def test_a_form_is_learned_from_the_template(calls: str, expected: CallSyntax | None) -> None:
    assert learn_syntax(_render(calls)) == expected


def test_values_are_read_by_the_functions_schema() -> None:
    syntax = learn_syntax(_render(_MARKED))
    assert syntax is not None
    text = (
        "<tool_call>\n<function=add>\n<parameter=count>\n3\n</parameter>\n<parameter=word>\n3\n</parameter>\n"
        "<parameter=text>\ntwo\nlines\n</parameter>\n</function>\n</tool_call>"
    )
    schema = {"properties": {"count": {"type": "integer"}, "word": {"type": "string"}, "text": {"type": "string"}}}
    assert syntax.parse(text, {"add": schema}) == [("add", {"count": 3, "word": "3", "text": "two\nlines"})]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "a", "argum',
        "<tool_call>\nnone",
        '<tool_call>{"arguments": {}}',
        '<tool_call>{"name": "a", "arguments": 3}',
    ],
)
def test_what_is_no_call_is_not_taken_for_one(text: str) -> None:
    with pytest.raises(ValueError):
        JsonCalls("<tool_call>", "name", "arguments").parse(text, {})
