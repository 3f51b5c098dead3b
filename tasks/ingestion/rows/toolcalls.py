"""Tool definitions and tool calls in one form: what chat templates and the chat completions API use.

A definition is `{"type": "function", "function": {"name", "description", "parameters"}}`, a call
`{"type": "function", "id"?, "function": {"name", "arguments"}}` with arguments as an object, never as text:
templates write an object as JSON, and would write a text as a quoted string.

Columns of Arrow and Parquet files give every object the keys of all others, as nulls. A null is taken out where
it cannot have been meant: in a JSON Schema (where null is no schema, and `default: null` says nothing), and in
arguments where the function's schema does not know the key or does not let it be null. Other nulls stay, and are
counted.
"""

import json
import re
from collections import Counter
from typing import Any

from tasks.ingestion.errors import RowError

THINK = re.compile(r"^\s*<think>(.*?)</think>\s*", re.DOTALL)
TOOL_CALL = re.compile(r"\s*<tool_call>\s*(.*?)\s*</tool_call>\s*", re.DOTALL)
KEPT_NULL = "null arguments that may be meant or may come from the columns of Arrow"


def read_tools(value: Any, *, invented_nulls: bool) -> list[dict[str, Any]] | None:
    """Return the definitions of a tools column: a list, one definition, JSON text of these, or nothing."""
    tools = _parse_text(value, "bad_tools", "tools") if isinstance(value, str) and value.strip() else value
    if not tools or (isinstance(tools, str) and not tools.strip()):
        return None
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise RowError("bad_tools", f"tools are of type {type(tools).__name__}: a list of definitions is wanted")
    return [_read_tool(tool, invented_nulls=invented_nulls) for tool in tools]


def _read_tool(tool: Any, *, invented_nulls: bool) -> dict[str, Any]:
    """Bring one definition to the wrapped form."""
    if isinstance(tool, str):
        tool = _parse_text(tool, "bad_tools", "a tool")
    if invented_nulls:
        tool = _drop_nulls(tool)
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("bad_tools", f"a tool without a name: {str(tool)[:120]}")
    is_bare = function is tool
    if isinstance(function.get("parameters"), str):
        function = {**function, "parameters": _parse_text(function["parameters"], "bad_tools", "parameters")}
    if is_bare:
        return {"type": "function", "function": {key: part for key, part in function.items() if key != "type"}}
    return {**tool, "type": tool.get("type", "function"), "function": function}


def _drop_nulls(value: Any) -> Any:
    """Copy a definition without its null keys."""
    if isinstance(value, dict):
        return {key: _drop_nulls(part) for key, part in value.items() if part is not None}
    return [_drop_nulls(part) for part in value] if isinstance(value, list) else value


def name_schemas(tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Map each function's name to its parameters' schema."""
    return {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or []}


def read_tool_calls(value: Any, schemas: dict[str, Any] | None, unused: Counter[str]) -> list[dict[str, Any]]:
    """Bring a message's tool calls to one form.

    Args:
        value: a list of calls, or one; wrapped in `function` or bare.
        schemas: parameters by function name where nulls may come from Arrow's columns, else None.
        unused: counts the nulls that had to stay.

    Raises:
        RowError: bad_tool_call.
    """
    calls = [value] if isinstance(value, dict) else value
    if not isinstance(calls, list):
        raise RowError("bad_tool_call", f"tool_calls are of type {type(value).__name__}: a list is wanted")
    return [_read_tool_call(call, schemas, unused) for call in calls]


def _read_tool_call(call: Any, schemas: dict[str, Any] | None, unused: Counter[str]) -> dict[str, Any]:
    """Bring one call to the wrapped form with arguments as an object."""
    if isinstance(call, str):
        call = _parse_text(call, "bad_tool_call", "a tool call")
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("bad_tool_call", f"a tool call without a name: {str(call)[:120]}")
    if call.get("type") not in (None, "function"):
        raise RowError("bad_tool_call", f"a tool call of type {call['type']!r}: only functions are known")
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parse_text(arguments, "bad_tool_call", f"the arguments of {name}")
        if isinstance(arguments, str) and arguments.lstrip().startswith("{"):  # encoded twice
            arguments = _parse_text(arguments, "bad_tool_call", f"the arguments of {name}")
    elif arguments is None or isinstance(arguments, str):
        arguments = {}
    elif schemas is not None and isinstance(arguments, dict):
        arguments = _drop_invented(arguments, schemas.get(name), unused)
    if not isinstance(arguments, dict):
        raise RowError("bad_tool_call", f"the arguments of {name} are {str(arguments)[:80]!r}: an object is wanted")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"type": "function", **identity, "function": {"name": name, "arguments": arguments}}


def _drop_invented(arguments: dict[str, Any], schema: Any, unused: Counter[str]) -> dict[str, Any]:
    """Copy arguments without the nulls that the function's schema rules out."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    kept: dict[str, Any] = {}
    for key, value in arguments.items():
        known = properties.get(key) if isinstance(properties, dict) else None
        if value is None and isinstance(properties, dict) and not _allows_null(known):
            continue
        if value is None:
            unused[KEPT_NULL] += 1
        kept[key] = _drop_invented(value, known, unused) if isinstance(value, dict) else value
    return kept


def _allows_null(schema: Any) -> bool:
    """Tell whether a property's schema lets it be null; an unknown property must not be."""
    if not isinstance(schema, dict):
        return False
    kinds = schema.get("type")
    if kinds is None:
        return True
    return "null" in (kinds if isinstance(kinds, list) else [kinds]) or bool(schema.get("nullable"))


def read_function_call_text(text: str, unused: Counter[str]) -> tuple[list[dict[str, Any]], str | None]:
    """Parse the text of a ShareGPT function_call turn.

    It is JSON of one call or a list of calls, or calls in <tool_call> tags, and may begin with a <think> block.

    Returns:
        The calls, and the words of the <think> block or None.

    Raises:
        RowError: bad_tool_call.
    """
    think = THINK.match(text)
    rest = text[think.end() :] if think else text
    tagged = TOOL_CALL.findall(rest)
    if tagged and not TOOL_CALL.sub("", rest).strip():
        values = [_parse_text(part, "bad_tool_call", "a function call") for part in tagged]
    else:
        values = [_parse_text(rest, "bad_tool_call", "a function call")]
    calls = [call for value in values for call in (value if isinstance(value, list) else [value])]
    if not calls:
        raise RowError("bad_tool_call", "the function call is an empty list")
    return read_tool_calls(calls, None, unused), think.group(1).strip("\n") if think else None


def _parse_text(text: str, reason: str, what: str) -> Any:
    """Parse JSON text inside a row."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(reason, f"{what} is not JSON ({error}): {text[:120]}") from None
