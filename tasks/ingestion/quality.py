"""What looks wrong in rows that are kept, and what the rows are like: reported, never repaired."""

import re
from typing import Any

import ftfy
import numpy as np
import polars as pl
from numpy.typing import NDArray

TEXT_PROBLEMS: dict[str, str] = {
    "control_characters": "control characters (other than tab, line feed and carriage return) are in the text",
    "replacement_characters": "U+FFFD is in the text: an earlier decoding lost characters",
    "mojibake": "the text looks like UTF-8 that was decoded as another encoding (ftfy would repair it)",
}
# C0 without tab, line feed and carriage return; delete; C1.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# ftfy's pattern without its spaces and comments, and with any character for \s, \w and ^, which Rust takes otherwise.
_BADNESS = re.sub(r"\\[sw]|\^(?=\[)", "(?s:.?)", re.sub(r"(\[[^\]]*\])|#.*|\s", r"\1", ftfy.badness.BADNESS_RE.pattern))
# A necessary condition of every problem in the syntax of Rust's regex crate, for messages as JSON: C0 is escaped.
ODD = rf"\\(?:u00|[bf])|[\x7f-\x{{9f}}\x{{fffd}}]|{_BADNESS}"
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


def check_quality(rows: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Return, by code, how many rows of an index have a problem and the places of the first ones."""
    problems = rows["problems"].to_numpy()
    masks = {code: (problems >> place & 1).astype(np.bool_) for place, code in enumerate(TEXT_PROBLEMS)}
    masks["length_outlier"] = _find_length_outliers(rows)
    return {
        code: {"num_rows": int(np.count_nonzero(mask)), "places": list_places(rows, np.flatnonzero(mask))}
        for code, mask in masks.items()
    }


def list_places(rows: pl.DataFrame, places: NDArray[np.int64]) -> list[str]:
    """Return source and line of the first of these rows."""
    first = rows[places[:PLACES_SHOWN]]
    return [f"{source}:{line}" for source, line in first.select("source", "line").iter_rows()]


def _find_length_outliers(rows: pl.DataFrame) -> NDArray[np.bool_]:
    """Tell which rows have a length in characters outside the outer fences."""
    if rows.height < MIN_ROWS_FOR_OUTLIERS:
        return np.zeros(rows.height, dtype=np.bool_)
    lengths = np.log1p((rows["prompt_characters"] + rows["answer_characters"]).to_numpy())
    low, high = np.quantile(lengths, [0.25, 0.75])
    # Rows of nearly one length have no spread to measure by: a factor of two is allowed at least.
    reach = max(FENCE * (high - low), np.log(2.0))
    return (lengths < low - reach) | (lengths > high + reach)


def describe_rows(rows: pl.DataFrame) -> dict[str, Any]:
    """Return statistics of one side of the split: turns, tools and lengths in characters."""
    statistics: dict[str, Any] = {
        "num_rows": rows.height,
        "num_with_tools": int(rows["has_tools"].sum()),
        "num_multi_turn": int((rows["num_turns"] > 1).sum()),
    }
    columns = {"prompt_characters": "prompt_characters", "answer_characters": "answer_characters", "turns": "num_turns"}
    for name, column in columns.items():
        series = rows[column].cast(pl.Int64)
        statistics[name] = {
            "min": series.min(),
            **{f"p{part}": series.quantile(part / 100, "nearest") for part in (10, 50, 90, 99)},
            "max": series.max(),
            "total": series.sum(),
        }
    return statistics
