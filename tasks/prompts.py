"""From a chat request to the ids that the model sees: one way for training, evaluation, chat and serving.

A registered model carries a copy of this module and of its settings, so it stands alone: it imports nothing of this
project. The chat template renders a normal form of the request, in which one meaning has one shape; what spells a
control token in a content stays text.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

SETTINGS_FILE = "prompts.json"
# Keys of a message that steer training and that no server would see.
_TRAINING_KEYS = frozenset({"train", "weight"})
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PROBE = "Verbum6Tyx"
_ID_LENGTH = 9
"""Of the ids of calls that Mistral's templates take."""
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Probe",
        "parameters": {"type": "object", "properties": {"word": {"type": "string", "description": "A word"}}},
    },
}

Message = dict[str, Any]
Tool = dict[str, Any]
Tokens = tuple[str, ...] | frozenset[str]
Render = Callable[[list[Message], list[Tool] | None], str]
"""Renders messages and tools with the generation prompt; raises where the template refuses them."""


class RequestError(ValueError):
    """A request that cannot be understood; the message says where."""


@dataclass(frozen=True)
class Forms:
    """The forms in which a template takes what has several."""

    content_as_parts: bool = False
    """Contents are lists of `{"type": "text", "text": …}`, because it loops over them."""
    arguments_as_text: bool = False
    """Arguments of calls are JSON text, because it writes them as they are."""
    call_id_length: int | None = None
    """Calls and results have ids of so many letters and digits, because it refuses others; 0 for any length. None: as
    they are."""


@dataclass(frozen=True)
class PromptSettings:
    """What is known of a template, and what contents may not become."""

    forms: Forms = Forms()
    control_tokens: tuple[str, ...] | None = None
    """Added tokens that contents spell as text; None for the tokenizer's special ones."""


DEFAULT_SETTINGS = PromptSettings()
"""Contents and arguments as most templates take them, and special tokens as text."""


def save_settings(settings: PromptSettings, folder: Path) -> None:
    """Save settings beside a tokenizer."""
    (folder / SETTINGS_FILE).write_text(json.dumps(asdict(settings), ensure_ascii=False) + "\n", encoding="utf-8")


def load_settings(folder: Path, tokenizer: Any) -> PromptSettings:
    """Return the settings beside a tokenizer, or what its template shows where there are none."""
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        return PromptSettings(find_forms(lambda messages, tools: _render(tokenizer, messages, tools)))
    saved = json.loads(path.read_text(encoding="utf-8"))
    tokens = saved["control_tokens"]
    return PromptSettings(Forms(**saved["forms"]), None if tokens is None else tuple(tokens))


def make_prompt(
    tokenizer: Any, settings: PromptSettings, messages: Sequence[Message], tools: Sequence[Tool] | None = None
) -> list[int]:
    """Return the ids that the model sees before its answer.

    Raises:
        RequestError: a message is not a mapping with a role, or its content is no text.
        Exception: the template refuses the messages.
    """
    plain = normalize_messages(messages, settings.forms)
    definitions = normalize_tools(tools)
    tokens = settings.control_tokens
    if tokens is None:
        tokens = tuple(sorted(special_tokens(tokenizer)))
    if not count_literals(tokens, [plain, definitions]):
        return encode_text(tokenizer, _render(tokenizer, plain, definitions))
    plain, definitions, marks = mark_literals(tokens, plain, definitions)
    return encode_marked(tokenizer, _render(tokenizer, plain, definitions), marks)


def _render(tokenizer: Any, messages: list[Message], tools: list[Tool] | None) -> str:
    return str(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))


def normalize_messages(messages: Sequence[Message], forms: Forms) -> list[Message]:
    """Return messages as the template will see them.

    A developer is a system; a content that is null or missing is empty, and one of text parts is their text; arguments
    of calls are objects; reasoning stands under the names that templates read; keys that are null, and those that
    steer training, are gone.

    Raises:
        RequestError: a message is not a mapping with a role, or its content is no text.
    """
    plain = [_normalize_message(number, message, forms) for number, message in enumerate(messages)]
    return plain if forms.call_id_length is None else _give_call_ids(plain, forms.call_id_length)


def _normalize_message(number: int, message: Any, forms: Forms) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"message {number}: a mapping with a role is wanted, got {message!r:.200}")
    role = "system" if message["role"] == "developer" else message["role"]
    content: Any = _read_content(number, message.get("content"))
    if forms.content_as_parts:
        content = [{"type": "text", "text": content}]
    if len(message) == 2 and "content" in message:
        return {"role": role, "content": content}
    plain = {
        key: _to_plain(value)
        for key, value in message.items()
        if value is not None and key not in _TRAINING_KEYS and key not in _REASONING_KEYS
    }
    calls = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = [_normalize_call(number, call, forms) for call in calls]
    reasoning = next((message[key] for key in _REASONING_KEYS if message.get(key) is not None), None)
    if reasoning is not None:
        plain |= {"reasoning_content": str(reasoning), "thinking": str(reasoning)}
    return plain | {"role": role, "content": content}


def _read_content(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return str(content)
    if isinstance(content, Mapping):  # a tool's result
        return json.dumps(_to_plain(content), ensure_ascii=False)
    texts = []
    for part in content if isinstance(content, list | tuple) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RequestError(f"message {number}: its content has a part that is no text: {part!r:.100}")
        texts.append(text)
    return "".join(texts)


def _normalize_call(number: int, call: Any, forms: Forms) -> dict[str, Any]:
    """Return a call with its function nested, and its arguments as the template takes them."""
    if not isinstance(call, Mapping):
        raise RequestError(f"message {number}: a tool call is wanted to be an object, got {call!r:.100}")
    given = call.get("function")
    function = dict(given) if isinstance(given, Mapping) else {k: call[k] for k in ("name", "arguments") if k in call}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments) if arguments.strip() else {}
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    if forms.arguments_as_text and not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    function["arguments"] = {} if arguments is None else arguments
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments", "type")}
    return {**rest, "type": "function", "function": function}


def _give_call_ids(messages: Sequence[Message], length: int) -> list[Message]:
    """Return messages in which each call of a tool has an id that the template takes, and each result its call's.

    What has none is numbered: call00001 is the conversation's first call, however many follow.
    """
    renamed: dict[str, str] = {}
    waiting: list[str] = []
    numbered = []
    num_calls = 0
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            num_calls += 1
            call_id = _fit_call_id(call.get("id"), num_calls, length)
            renamed[str(call.get("id"))] = call_id
            calls.append(call | {"id": call_id})
        if calls:
            waiting = [call["id"] for call in calls]
            message = message | {"tool_calls": calls}
        elif message["role"] == "tool":
            given = message.get("tool_call_id")
            # A result that names no call is that of the first call without one.
            known = renamed.get(str(given)) if given else next(iter(waiting), None)
            call_id = known or _fit_call_id(given, num_calls, length)
            waiting = [other for other in waiting if other != call_id]
            message = message | {"tool_call_id": call_id}
        numbered.append(message)
    return numbered


def _fit_call_id(call_id: Any, number: int, length: int) -> str:
    """Return an id if the template takes it, else one with the call's number."""
    if isinstance(call_id, str) and (not length or (len(call_id) == length and call_id.isalnum())):
        return call_id
    return f"call{number:0{max(length or _ID_LENGTH, 5) - 4}d}"


def normalize_tools(tools: Sequence[Tool] | None) -> list[Tool] | None:
    """Return definitions of tools as templates take them, each under its function; None for none at all."""
    if not tools:
        return None
    plain: list[Tool] = [_to_plain(tool) for tool in tools]
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in plain]


def _to_plain(value: Any) -> Any:
    """Copy plain data."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def find_forms(render: Render) -> Forms:
    """Find out by probes in which forms a template takes contents, arguments and ids of calls."""
    question = [{"role": "user", "content": _PROBE}]
    as_parts = Forms(content_as_parts=True)
    if _writes(render, question, Forms(), _PROBE):
        forms = Forms()
    # Python's own writing of a part is no text.
    elif _writes(render, question, as_parts, _PROBE) and not _writes(render, question, as_parts, "'text'"):
        forms = as_parts
    else:
        return Forms()
    forms = replace(forms, arguments_as_text=_wants_arguments_as_text(render, forms))
    return replace(forms, call_id_length=_find_id_length(render, forms))


def _find_id_length(render: Render, forms: Forms) -> int | None:
    """Return how long ids of calls have to be for a template: 0 for any length, None where they may be missing."""

    def takes(call_id: str) -> bool:
        call = {"function": {"name": "probe", "arguments": {}}, **({"id": call_id} if call_id else {})}
        calling: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        messages = [{"role": "user", "content": "x"}, calling]
        return _writes(render, messages, forms, "probe")

    if takes("") or not takes("probe1234"):
        return None
    return 0 if takes("probe-of-another-length") else _ID_LENGTH


def _wants_arguments_as_text(render: Render, forms: Forms) -> bool:
    call = {"name": "probe", "arguments": {_PROBE: "x"}}
    called: list[Message] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "probe1234", "function": call}]},
        {"role": "tool", "content": "x", "tool_call_id": "probe1234", "name": "probe"},
    ]
    as_text = replace(forms, arguments_as_text=True)
    written = f'"{_PROBE}"'
    for messages in (called, called[:2]):
        in_python = _writes(render, messages, forms, f"'{_PROBE}'")
        if _writes(render, messages, forms, _PROBE) and not in_python:
            return False
        if _writes(render, messages, as_text, written):
            return True
    return False


def _writes(render: Render, messages: list[Message], forms: Forms, text: str) -> bool:
    """Tell whether a template takes messages in these forms and writes a text of theirs."""
    tools = [_PROBE_TOOL] if len(messages) > 1 else None
    try:
        return text in render(normalize_messages(messages, forms), tools)
    except Exception:
        return False


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """Return the added tokens that control something: flagged as special, or with a name such as eos."""
    named = {str(token) for token in tokenizer.all_special_tokens}
    tokens = tokenizer.added_tokens_decoder.values()
    return frozenset(
        token.content for token in tokens if token.content.strip() and (token.special or token.content in named)
    )


@dataclass(frozen=True)
class Marks:
    """The two characters around a literal control token, and how to find them again."""

    opening: str
    closing: str
    marked: re.Pattern[str]
    """A marked token, or one of the two characters alone."""

    def remove(self, text: str) -> str:
        """Return the text without marks."""
        return text.replace(self.opening, "").replace(self.closing, "")


@lru_cache(maxsize=16)
def find_tokens(tokens: Tokens) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """Return the tokens' first two characters, for a quick look, and a pattern of the tokens, longest first."""
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
    return tuple(sorted({token[:2] for token in ordered})), pattern


def text_of(content: Any) -> str:
    """Return the text of a content, or of its parts."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") for part in content or [] if isinstance(part, dict))


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string of messages or tools but the keys and roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def count_literals(tokens: Tokens, contents: Any) -> int:
    """Return how often contents spell a token."""
    prefixes, pattern = find_tokens(tokens)
    num_literals = 0
    for text in strings_of(contents):
        if any(prefix in text for prefix in prefixes):
            num_literals += len(pattern.findall(text))
    return num_literals


def mark_literals(
    tokens: Tokens, messages: Sequence[Message], tools: Sequence[Tool] | None
) -> tuple[list[Message], list[Tool] | None, Marks]:
    """Put marks around the control tokens that contents spell.

    Raises:
        RequestError: no two characters are left for marks.
    """
    pattern = find_tokens(tokens)[1]
    used = {character for text in strings_of([messages, tools]) for character in text if character >= "\ue000"}
    free = [chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used][:2]
    if len(free) < 2:
        raise RequestError("the contents use the whole private area of Unicode: none is left for marks")
    opening, closing = free
    marks = Marks(opening, closing, re.compile(f"{opening}({pattern.pattern}){closing}|[{opening}{closing}]"))

    def mark(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(f"{opening}\\g<0>{closing}", value)
        if isinstance(value, dict):
            return {key: item if key == "role" else mark(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark(item) for item in value]
        return value

    return mark(list(messages)), mark(list(tools)) if tools is not None else None, marks


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode as `apply_chat_template` does: added tokens are recognised, none is put around."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_marked(tokenizer: Any, text: str, marks: Marks) -> list[int]:
    """Encode a rendered text whose marked tokens stay text.

    A mark that the template has torn from its token still ends a piece, so that the text around cannot join into a
    control token.

    Raises:
        RequestError: the tokenizer has only the control token for such a text.
    """
    pieces = marks.marked.split(text)
    line_end = encode_text(tokenizer, "\n")
    ids = encode_text(tokenizer, pieces[0])
    for number, piece in enumerate(pieces[1:], start=1):
        if not piece:
            continue
        # Behind a line's end, so that no space is put before a piece that is not the text's first.
        encode_piece = _encode_as_text if number % 2 else encode_text
        piece_ids = encode_piece(tokenizer, "\n" + piece)
        if piece_ids[: len(line_end)] == line_end:
            piece_ids = piece_ids[len(line_end) :]
        else:
            piece_ids = encode_piece(tokenizer, piece)
        if number % 2 and tokenizer.convert_tokens_to_ids(piece) in piece_ids:
            raise RequestError(f"the tokenizer has only the control token for the text {piece!r}")
        ids += piece_ids
    return ids


def _encode_as_text(tokenizer: Any, text: str) -> list[int]:
    """Encode with no added token recognised, special or not."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [token.id for piece in pieces for token in backend.model.tokenize(piece)]
