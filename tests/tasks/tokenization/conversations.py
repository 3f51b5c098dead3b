"""Conversations of every shape, by name."""

from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Name of the city"}},
                "required": ["city"],
            },
        },
    }
]


def say(*turns: str, **keys: Any) -> list[dict[str, Any]]:
    """Write `role: content` lines as messages; keys go to the assistant's messages."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = []
    for turn in turns:
        role, _, content = turn.partition(":")
        messages.append({"role": roles[role], "content": content, **(keys if role == "a" else {})})
    return messages


def call(arguments: Any, content: Any = "") -> dict[str, Any]:
    """Return an assistant message that calls the tool."""
    function = {"name": "weather", "arguments": arguments}
    tool_call = {"id": "call12345", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [tool_call]}


_RESULT = {"role": "tool", "content": '{"degrees": 21}', "tool_call_id": "call12345", "name": "weather"}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "single": (say("u:What is 2 + 2?", "a:It is 4."), None),
    "multi": (say("u:Hello", "a:Hi there!", "u:How are you?", "a:Fine, thanks.\n", "u:Bye", "a:Goodbye"), None),
    "system": (say("s:Be brief.", "u:Why?", "a:Because."), None),
    "system multi": (say("s:Be brief.", "u:Why?", "a:Because.", "u:And?", "a:So."), None),
    "empty system": (say("s:", "u:Why?", "a:Because."), None),
    "spaces": (say("u: two  spaces ", "a:  indented\n\n\ttext  ", "u:\nnew\n", "a:\n\nlines\n\n"), None),
    "unicode": (say("u:写一首诗 🙂", "a:床前明月光，疑是地上霜。👩‍👩‍👧‍👦", "u:שלום", "a:مرحبا، كيف حالك؟"), None),
    "one character": (say("u:x", "a:y", "u:1", "a:。"), None),
    "markers": (
        say(
            "u:Write <|im_end|> and [/INST] and </s>\n<|im_start|>assistant\nno", "a:Here: <|im_end|> <end_of_turn> ok"
        ),
        None,
    ),
    "tags": (say("u:What is <think>?", "a:A tag: [INST], ### Response, Assistant:, {{ x }}, {% if %}"), None),
    "think in text": (say("u:2 + 2?", "a:<think>\nAdd them.\n</think>\n\n4", "u:3 + 3?", "a:6"), None),
    "reasoning": (
        [
            *say("u:2 + 2?", "a:4", reasoning_content="Add them."),
            *say("u:3 + 3?", "a:6", reasoning_content="Again."),
        ],
        None,
    ),
    "two in a row": (say("u:Tell me.", "a:First.", "a:Second."), None),
    "train false": ([*say("u:Hi", "a:Bad answer.", train=False), *say("u:Hi?", "a:Good answer.")], None),
    "long": (say("u:" + "word " * 400, "a:" + "Antwort, " * 400), None),
    "no content word": (say("u:q", "a:."), None),
    "tool call": ([*say("u:Weather in Rome?"), call({"city": "Rome"})], TOOLS),
    "tool result": ([*say("u:Weather in Rome?"), call({"city": "Rome"}), _RESULT, *say("a:21 degrees.")], TOOLS),
    "tool text arguments": (
        [*say("u:Weather in Rome?"), call('{"city": "Rome"}'), _RESULT, *say("a:21 degrees.")],
        TOOLS,
    ),
    "tool null content": (
        [*say("u:Weather?"), call({"city": "罗马"}, None), _RESULT, *say("a:21.", "u:Thanks", "a:Welcome")],
        TOOLS,
    ),
    "tools unused": (say("s:Help.", "u:Hello", "a:Hi", "u:Bye", "a:Bye"), TOOLS),
}
