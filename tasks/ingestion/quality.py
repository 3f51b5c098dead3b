"""What looks wrong in rows that are kept, and what the rows are like: reported, never repaired."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ftfy
import numpy as np
import polars as pl

if TYPE_CHECKING:
    from tasks.ingestion.identity import Conversation

TEXT_PROBLEMS: dict[str, str] = {
    "control_characters": "control characters (other than tab, line feed and carriage return) are in the text",
    "replacement_characters": "U+FFFD is in the text: an earlier decoding lost characters",
    "mojibake": "the text looks like UTF-8 that was decoded as another encoding (ftfy would repair it)",
}
# C0 without tab, line feed and carriage return; delete; C1.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
PLACES_SHOWN = 10
MIN_ROWS_FOR_OUTLIERS = 20
# Tukey's outer fences: quartiles and three interquartile ranges beyond, here of the logarithm of the length.
FENCE = 3.0


def find_text_problems(text: str) -> tuple[str, ...]:
    """Return the codes of TEXT_PROBLEMS that hold for the text."""
    problems = ["control_characters"] if CONTROL.search(text) else []
    if not text.isascii():
        if "\ufffd" in text:
            problems.append("replacement_characters")
        if ftfy.badness.is_bad(text) and ftfy.fix_encoding(text) != text:
            problems.append("mojibake")
    return tuple(problems)


def check_quality(conversations: Sequence["Conversation"]) -> dict[str, dict[str, Any]]:
    """Return, by code, how many conversations have a problem and the places of the first ones."""
    found: dict[str, list[Conversation]] = {code: [] for code in (*TEXT_PROBLEMS, "length_outlier")}
    for conversation in conversations:
        for code in conversation.problems:
            found[code].append(conversation)
    found["length_outlier"] = _find_length_outliers(conversations)
    return {
        code: {"num_rows": len(rows), "places": [f"{row.source}:{row.line}" for row in rows[:PLACES_SHOWN]]}
        for code, rows in found.items()
    }


def _find_length_outliers(conversations: Sequence["Conversation"]) -> list["Conversation"]:
    """Return conversations whose length in characters lies outside the outer fences."""
    if len(conversations) < MIN_ROWS_FOR_OUTLIERS:
        return []
    lengths = np.log([1 + row.prompt_characters + row.answer_characters for row in conversations])
    low, high = np.quantile(lengths, [0.25, 0.75])
    # Rows of nearly one length have no spread to measure by: a factor of two is allowed at least.
    reach = max(FENCE * (high - low), np.log(2.0))
    outside = (lengths < low - reach) | (lengths > high + reach)
    return [conversations[index] for index in np.flatnonzero(outside).tolist()]


def describe_rows(conversations: Sequence["Conversation"]) -> dict[str, Any]:
    """Return statistics of one side of the split: turns, tools and lengths in characters."""
    columns: dict[str, Callable[[Conversation], int]] = {
        "prompt_characters": lambda row: row.prompt_characters,
        "answer_characters": lambda row: row.answer_characters,
        "turns": lambda row: row.num_turns,
    }
    statistics: dict[str, Any] = {
        "num_rows": len(conversations),
        "num_with_tools": sum(row.tools is not None for row in conversations),
        "num_multi_turn": sum(row.num_turns > 1 for row in conversations),
    }
    for name, read in columns.items():
        series = pl.Series([read(row) for row in conversations], dtype=pl.Int64)
        statistics[name] = {
            "min": series.min(),
            **{f"p{part}": series.quantile(part / 100, "nearest") for part in (10, 50, 90, 99)},
            "max": series.max(),
            "total": series.sum(),
        }
    return statistics
