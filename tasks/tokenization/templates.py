"""Prepares the tokenizer that ships with the model: its chat template, its pad token, and its stop tokens."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from tasks.allowed_roots import check_allowed
from tasks.models import load_tokenizer
from tasks.tokenization.endings import find_anchor
from tasks.tokenization.errors import MaskError
from tasks.tokenization.rendering import Chat, open_chat, render

TemplateArgument = bool | int | float | str
# What every template is given.
_GIVEN = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
)
BUILT_IN: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "deepseek3": ("<｜User｜>", "<｜Assistant｜>"),
    **dict.fromkeys(("mistral", "llama2", "deepseek", "zephyr", "vicuna", "alpaca", "plain"), ()),
}
"""Templates written here, each with the tokens that a vocabulary has to have for it; the others ask for eos alone."""
DEFAULT = "default:"
"""Before a name: for a tokenizer that has no template."""
# What templates that change contents touch: quotes, markup, case, digits, inner spaces, other scripts; and length.
_PROBE = 'Say "it\'s" & <b>BOLD</b>: 3,50 x 1e5\n\n  naïve 水 – ünï\t/end\n' * 50 + "Done"

_MAX_FRAME = 100_000
"""Characters that a template may write around a question and its answer, a default system message included."""

# Tokens that vocabularies keep for padding or for nothing, best first; a pattern matches the whole token.
_PAD_LIKE = (
    r"<\|?pad\|?>|\[PAD\]|<\|padding\|>|<\|pad_token\|>",
    r"<\|finetune_right_pad_id\|>",
    r"<\|endoftext\|>|<\|end_of_text\|>",
    r".*(fim|vision|image|video)_pad.*",
    r".*(reserved|placeholder|unused|control_|extra_|dummy|buffer).*\d+.*",
    r"<unk>|<\|unk\|>|\[UNK\]",
)


class TemplateError(ValueError):
    """A chat template or tokenizer that cannot be used; the message says which and the way out."""


@dataclass(frozen=True)
class PreparedTokenizer:
    """A tokenizer ready to ship."""

    tokenizer: PreTrainedTokenizerBase
    template_digest: str
    """sha256 of the chat template's text, hexadecimal."""
    notes: tuple[str, ...]
    """What was chosen or added, a sentence each."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a generation: the template's end of turn, then eos; for generation_config.eos_token_id."""
    template_name: str = ""
    """The template in a person's words."""
    end_of_turn: str = ""
    """What the template writes behind an answer's words for the model to say; empty when it writes nothing."""


def prepare_tokenizer(
    model_folder: Path, chat_template: str | None, arguments: Mapping[str, TemplateArgument] = MappingProxyType({})
) -> PreparedTokenizer:
    """Load a tokenizer, and give it a chat template and a pad token where it has none.

    No token is ever added to the vocabulary, so that no embedding has to be resized.

    Args:
        model_folder: Where the tokenizer lies.
        chat_template: A built-in template's name or a .jinja file; with `default:` before it, the tokenizer's own where
            it has one; None for that, else chatml.
        arguments: Values that the template reads. They are written at its front, so that whoever serves the model
            renders with them; a request that gives its own has the last word.

    Raises:
        ModelError: no tokenizer loads.
        TemplateError: the template does not exist or is not valid, or there is no eos token to end answers.
    """
    tokenizer = load_tokenizer(model_folder)
    name, note = _set_template(tokenizer, chat_template)
    notes = [note]
    if arguments:
        _set_arguments(tokenizer, arguments)
        notes.append(f"The chat template renders with {json.dumps(dict(arguments))}, saved at its front.")
    try:
        chat = open_chat(tokenizer)
    except MaskError as error:
        raise TemplateError(f"{model_folder}: {error}") from None
    _check_contents(chat)
    end_of_turn = find_anchor(chat.ending.kept, chat.pattern)
    stops = [chat.added[end_of_turn]] if end_of_turn in chat.added else []
    if chat.ending.known and not chat.ending.closed:
        if tokenizer.eos_token_id is None:
            raise TemplateError(
                f"{model_folder}: the chat template writes no end of turn and the tokenizer has no eos token: set "
                "eos_token in tokenizer_config.json, or model.chat_template to a template that ends its turns"
            )
        notes.append(f"The template writes no end of turn: {tokenizer.eos_token!r} is put after each answer.")
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(int(tokenizer.eos_token_id))
    if chat.forms.call_id_length is not None:
        notes.append(
            "The template wants ids of tool calls: calls whose id is missing or of another length are numbered "
            "call00001 and so on, in training and when the model is served."
        )
    if "strftime_now" in chat.source:
        notes.append("The template writes today's date: other days give other prompts.")
    notes += _set_pad(tokenizer, set(stops))
    digest = hashlib.sha256(_text_of(tokenizer).encode()).hexdigest()
    title = f"the chat template {name or f'of {model_folder.name}'}"
    return PreparedTokenizer(tokenizer, digest, tuple(notes), tuple(stops), title, chat.ending.kept)


def _set_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, TemplateArgument]) -> None:
    """Write values at the front of the template, or of each where there are several; once.

    Raises:
        TemplateError: a name is not one that a template can read, or one that it is given anyway.
    """
    for name in arguments:
        if not name.isidentifier() or name in _GIVEN:
            raise TemplateError(
                f"tokenization.template_arguments: {name!r} is not the name of an argument: letters, digits and _ are "
                f"allowed, and not {', '.join(sorted(_GIVEN))}"
            )
    front = "".join(
        f"{{%- set {name} = {name} if {name} is defined else {_to_jinja(value)} -%}}"
        for name, value in sorted(arguments.items())
    )
    template = tokenizer.chat_template

    def add(source: str) -> str:
        return source if source.startswith(front) else front + source

    tokenizer.chat_template = (
        add(template) if isinstance(template, str) else {name: add(source) for name, source in template.items()}
    )


def _to_jinja(value: TemplateArgument) -> str:
    return json.dumps(value, ensure_ascii=False)


def _check_contents(chat: Chat) -> None:
    """Refuse a template that writes other words than a question and its answer hold.

    Outer spaces do not count. A template that refuses the probe is judged by its rows.

    Raises:
        TemplateError: it changes, cuts or leaves out contents, or writes far more around them.
    """
    question, answer = {"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE[::-1]}
    try:
        texts = {
            "user": render(chat, [question], None, add_generation_prompt=True),
            "assistant": render(chat, [question, answer], None, add_generation_prompt=False),
        }
    except MaskError:
        return
    most = len(_PROBE) * 2 + _MAX_FRAME
    if (longest := max(map(len, texts.values()))) > most:
        raise TemplateError(
            f"{chat.name} writes {longest - 2 * len(_PROBE):,} characters around two messages, more than "
            f"{_MAX_FRAME:,}: set model.chat_template to another one ({', '.join(BUILT_IN)}, or a .jinja file)"
        )
    for message in (question, answer):
        if message["content"].strip() not in texts[message["role"]]:
            raise TemplateError(
                f"{chat.name} does not write what the {message['role']} says as it is: it changes, cuts or leaves out "
                "contents, so that the model would learn other words than those of the rows: set model.chat_template "
                f"to another one ({', '.join(BUILT_IN)}, or a .jinja file)"
            )


def _text_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template's text, or all of them where it has several."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _set_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> tuple[str, str]:
    """Set the chosen template; return its name, empty of the tokenizer's own, and what was done."""
    is_default = choice is None or choice.startswith(DEFAULT)
    choice = choice.removeprefix(DEFAULT) if choice else None
    if is_default and tokenizer.chat_template:
        return "", "The tokenizer's own chat template is used."
    if choice is not None and choice not in BUILT_IN:
        _set_template_file(tokenizer, Path(choice))
        return Path(choice).name, f"The chat template {Path(choice).name} is used and saved with the tokenizer."
    name, why = choice or "chatml", "the tokenizer has no chat template" if is_default else "as asked"
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in BUILT_IN[name] if token not in vocabulary]
    if missing and not is_default and name != "chatml":
        raise TemplateError(
            f"model.chat_template = {name!r} writes {', '.join(missing)}, which this vocabulary does not have, and no "
            f"token is added to one: choose one of {', '.join(each for each, needed in BUILT_IN.items() if not needed)}"
        )
    if missing:
        name, why = "plain", f"{why}, and the vocabulary has no {' and '.join(missing)}"
    if not BUILT_IN[name] and tokenizer.eos_token is None:
        raise TemplateError("the tokenizer has no eos token to end answers with: set eos_token in its folder")
    source = (Path(__file__).parent / f"{name}.jinja").read_text(encoding="utf-8")
    bos = tokenizer.bos_token_id
    # Served prompts are encoded without the tokens that a tokenizer adds by itself: the template has to write them.
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        source = "{{- bos_token -}}" + source
    tokenizer.chat_template = source
    return name, f"The built-in chat template {name} is used and saved with the tokenizer ({why})."


def _set_template_file(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Set a template from a file."""
    if path.suffix != ".jinja":
        raise TemplateError(
            f"model.chat_template = {str(path)!r}: give {', '.join(BUILT_IN)}, or the path of a .jinja file"
        )
    check_allowed(path, "model.chat_template")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(f"{path}: the chat template cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: not UTF-8 (byte {error.start}): save the template as UTF-8") from None


def _set_pad(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> list[str]:
    """Set a missing pad token; labels are made by position, so that even pad = eos leaves eos learnt."""
    if tokenizer.pad_token_id is not None:
        if tokenizer.pad_token_id in stops:
            return [f"The pad token is {tokenizer.pad_token!r}, which also ends answers: labels are made by position."]
        return []
    taken = stops | {tokenizer.bos_token_id}
    vocabulary = tokenizer.added_tokens_decoder
    for pattern in _PAD_LIKE:
        for index, token in sorted(vocabulary.items()):
            if index not in taken and re.fullmatch(pattern, token.content):
                tokenizer.pad_token = token.content
                return [f"The tokenizer has no pad token: the unused {token.content!r} is used."]
    if tokenizer.eos_token_id is None:
        raise TemplateError("the tokenizer has neither a pad nor an eos token: set them in its folder")
    tokenizer.pad_token = tokenizer.eos_token
    return [f"The tokenizer has no pad token: {tokenizer.eos_token!r} is used; labels are made by position."]
