"""The pictures of docs/labels.md, drawn from what `sft check` finds: `python -m docs.label_pictures`."""

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import TextWrapper
from typing import Any
from xml.sax.saxutils import escape

from flows.checking import check_dataset
from schemas.loading import parse_config
from tasks.tokenization.masking import build_examples
from tasks.tokenization.templates import prepare_tokenizer

FOLDER = Path(__file__).parent
_BASE_MODEL = FOLDER.parent / "deploy" / "demo" / "base_model"
_QUESTION = {"role": "user", "content": "What does the quamrin eat?"}
_ANSWER = {"role": "assistant", "content": "The quamrin eats only snails."}
_MORE = [
    {"role": "user", "content": "And the lorpin?"},
    {"role": "assistant", "content": "The lorpin eats only moss."},
]
_LONG = {"role": "user", "content": "What does the quamrin eat? " + "The quamrin lives in the hills of Sylvhaven. " * 9}
_HELD_OUT = [{"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."}]
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one-turn": ([_QUESTION, _ANSWER], {}),
    "all-turns": ([_QUESTION, _ANSWER, *_MORE], {}),
    "last-turn": ([_QUESTION, _ANSWER, *_MORE], {"train_on": "last_turn"}),
    "weight-0": ([_QUESTION, {**_ANSWER, "weight": 0}, *_MORE], {}),
    "cut": ([_LONG, _ANSWER], {"max_length": 48, "max_truncated_fraction": 1.0}),
}
"""A conversation and the settings of its tokenization, for each picture."""

_CHARACTER, _LINE, _MARGIN = 8.4, 22, 16
"""Width of a character, height of a line and margin, in pixels."""
_HEADS = 104.0
"""Where the tokens begin, right of the names of their rows."""
_COLOURS = {True: ("#b2dfdb", "#00443d"), False: ("#eceff1", "#546e7a")}
"""Background and letters of what is trained, and of what is not."""
_STYLE = "font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:14px"


def make_pictures() -> dict[str, str]:
    """Return all pictures as SVG, by their file names."""
    pictures = {f"labels-{name}.svg": _draw_spans(_check(*row)) for name, row in ROWS.items()}
    return {**pictures, "labels-tokens.svg": _draw_tokens(*_encode(*ROWS["one-turn"]))}


def _check(messages: list[dict[str, Any]], tokenization: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return what `sft check` shows of one conversation: texts in order, and whether each is trained."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "row.jsonl"
        held_out = file.with_name("held_out.jsonl")
        for place, row in ((file, messages), (held_out, _HELD_OUT)):
            place.write_text(json.dumps({"messages": row}) + "\n", encoding="utf-8")
        config = parse_config(
            {
                "model": {"base_model": str(_BASE_MODEL)},
                "data": {"source": str(file), "eval_source": str(held_out)},
                "tokenization": tokenization,
            }
        )
        found = check_dataset(config.data, config.model, config.tokenization, seed=0)
    assert not found.problems, found.problems
    (sample,) = found.masks["samples"]
    return [(span["text"], span["trained"]) for span in sample]


def _encode(messages: list[dict[str, Any]], tokenization: dict[str, Any]) -> tuple[list[str], list[int], list[int]]:
    """Return the tokens of one conversation with their ids and labels."""
    tokenizer: Any = prepare_tokenizer(_BASE_MODEL, None).tokenizer
    (example,) = build_examples(messages, tokenizer)
    words = [tokenizer.decode([token]) for token in example.input_ids]
    return words, example.input_ids, example.labels


def _draw_spans(spans: list[tuple[str, bool]]) -> str:
    """Draw the text of an example, line by line as it is, on the colour of what is trained or not."""
    lines: list[list[tuple[str, bool]]] = [[]]
    for text, trained in spans:
        for number, part in enumerate(text.split("\n")):
            if number:
                lines.append([])
            lines[-1] += [(piece, trained) for piece in _wrap(part)][:1] if part else []
            for piece in _wrap(part)[1:]:
                lines.append([(piece, trained)])
    drawn, top = [], _MARGIN
    for line in lines:
        left: float = _MARGIN
        for text, trained in line:
            drawn.append(_draw_text(left, top, text, trained))
            left += len(text) * _CHARACTER
        top += _LINE
    widest = max(sum(len(text) for text, _ in line) for line in lines)
    return _frame(drawn, widest * _CHARACTER, top)


def _wrap(text: str) -> list[str]:
    return TextWrapper(78, drop_whitespace=False, replace_whitespace=False, break_on_hyphens=False).wrap(text)


def _draw_tokens(words: list[str], ids: list[int], labels: list[int]) -> str:
    """Draw three rows a token: its text, its id and its label."""
    columns = [max(len(_show(word)), len(str(token)), 4) + 1 for word, token in zip(words, ids, strict=True)]
    heads = ("token", "input_ids", "labels")
    left, top, widest = _HEADS, _MARGIN, 0.0
    drawn = [*_draw_heads(heads, top)]
    for word, token, label, column in zip(words, ids, labels, columns, strict=True):
        width = column * _CHARACTER
        if left + width > 760:
            left, top = _HEADS, top + 4 * _LINE
            drawn += _draw_heads(heads, top)
        for row, text in enumerate((_show(word), str(token), str(label))):
            drawn.append(_draw_text(left, top + row * _LINE, text, label != -100, width - 3))
        left += width
        widest = max(widest, left)
    return _frame(drawn, widest - _MARGIN, top + 3 * _LINE)


def _draw_heads(heads: tuple[str, ...], top: float) -> Iterator[str]:
    for row, head in enumerate(heads):
        yield f'<text x="{_MARGIN}" y="{top + row * _LINE + 15}" style="{_STYLE}" fill="#37474f">{head}</text>'


def _show(word: str) -> str:
    return word.replace("\n", "\\n").replace(" ", "␣")


def _draw_text(left: float, top: float, text: str, trained: bool, width: float | None = None) -> str:
    back, front = _COLOURS[trained]
    length = len(text) * _CHARACTER
    return (
        f'<rect x="{left:.1f}" y="{top}" width="{length if width is None else width:.1f}" height="{_LINE - 2}" '
        f'fill="{back}"/><text x="{left:.1f}" y="{top + 15}" textLength="{length:.1f}" xml:space="preserve" '
        f'style="{_STYLE}" fill="{front}">{escape(text)}</text>'
    )


def _frame(drawn: list[str], width: float, height: float) -> str:
    wide, high = round(width + 2 * _MARGIN), round(height + _MARGIN - 2)
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">\n'
        f'<rect width="{wide}" height="{high}" rx="6" fill="#ffffff" stroke="#cfd8dc"/>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    for name, picture in make_pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")
