"""The quality page that a person reads: one HTML file about a dataset, without anything from outside."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.plurals import count_of
from tasks.ingestion.errors import name_place
from tasks.ingestion.reject_groups import group_rejects
from tasks.ingestion.rows.screening import KINDS, redact_text
from tasks.pages import open_templates

FILE_NAME = "quality.html"
SAMPLES_SHOWN = 3
"""Rows shown of each reason."""
MAX_TEXT = 800
"""Characters of a rejected row that are shown."""
MAX_RUN = 1500
"""Characters of one run of a mask sample that are shown."""

COLORS = {"trained": "good", "held out": "tuned", "duplicates": "base", "leaked": "warn", "rejected": "bad"}


@dataclass(frozen=True)
class Slice:
    """A part of the accounting bar."""

    name: str
    count: int
    percent: float
    color: str

    @property
    def label(self) -> str:
        """Name as it stands behind the count."""
        return "duplicate" if self.name == "duplicates" and self.count == 1 else self.name


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram; `percent` is of the highest one."""

    label: str
    count: int
    percent: float


def write_quality_page(
    folder: Path,
    quality: dict[str, Any],
    rejects: Iterable[Path],
    masks: dict[str, Any] | None,
    *,
    title: str,
    warnings: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> Path:
    """Write quality.html into a folder, which is made where it is missing.

    Every text is escaped: what a dataset says cannot become markup. Personal data and secrets that the screens know
    are shown as placeholders, unless the screens were off.

    Args:
        folder: where to write.
        quality: quality.json.
        rejects: rejects.parquet of ingestion, and where there is one, of tokenization.
        masks: masks.json of tokenization; None leaves out tokens and masks.
        title: heading of the page.
        warnings: of tokenization, a sentence each; those of ingestion are in quality.json.
        problems: broken budgets, for which a run would fail.

    Returns:
        The path of the page.
    """
    environment = open_templates(Path(__file__).parent)
    environment.filters["hide"] = str if quality["screen"]["mode"] == "off" else redact_text
    environment.filters["clip"] = clip_text
    environment.globals["name_place"] = name_place
    rows = count_rows(quality, masks)
    warnings = [*quality["warnings"], *warnings]
    tone, verdict = state_verdict(quality["counts"]["rows_read"], rows, is_noted=bool(warnings))
    html = environment.get_template("quality.html.jinja").render(
        title=title,
        tone="worse" if problems else tone,
        verdict=verdict,
        problems=problems,
        warnings=warnings,
        quality=quality,
        slices=slice_rows(rows),
        groups=group_rejects(rejects),
        kinds=KINDS,
        masks=None if masks is None else masks["train"],
        notes=[] if masks is None else masks["notes"],
        histograms={} if masks is None else describe_lengths(masks["train"]),
        max_run=MAX_RUN,
        samples_shown=SAMPLES_SHOWN,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path


def count_rows(quality: Mapping[str, Any], masks: Mapping[str, Any] | None) -> dict[str, int]:
    """Return where the rows taken in went, after tokenization where there are masks."""
    counts = quality["counts"]
    lost = {side: 0 if masks is None else sum(masks[side]["rejected"].values()) for side in ("train", "eval")}
    return {
        "trained": counts["rows_train"] - lost["train"],
        "held out": counts["rows_eval"] - lost["eval"],
        "duplicates": counts["rows_duplicate"],
        "leaked": counts["rows_leaked"],
        "rejected": sum(counts["rows_rejected"].values()) + sum(lost.values()),
    }


def state_verdict(num_read: int, rows: Mapping[str, int], *, is_noted: bool) -> tuple[str, str]:
    """Return a tone (better, mixed, worse) and a sentence: how much is used, and where to look.

    Args:
        num_read: rows that were read.
        rows: of `count_rows`.
        is_noted: whether there are warnings.
    """
    used = f"{_tell(rows['trained'], 'trained')} and {rows['held out']:,} {_be(rows['held out'])} held out"
    if not rows["trained"] or not rows["held out"]:
        return "worse", f"{used}: with one side empty, nothing can be trained and judged."
    if rows["rejected"]:
        percent = 100 * rows["rejected"] / num_read
        return (
            "mixed",
            f"{used}. {count_of(rows['rejected'], 'row')} ({percent:.2g} % of those read) {_be(rows['rejected'])} "
            "rejected: see why below.",
        )
    if is_noted:
        return "mixed", f"{used}, none is rejected. There is something to look at: see the notes below."
    return "better", f"{used}, none is rejected, and nothing looks wrong."


def _tell(number: int, what: str) -> str:
    return f"{count_of(number, 'row')} {_be(number)} {what}"


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def slice_rows(rows: Mapping[str, int]) -> list[Slice]:
    """Return the parts of the accounting bar."""
    total = max(1, sum(rows.values()))
    return [Slice(name, count, 100 * count / total, COLORS[name]) for name, count in rows.items()]


def describe_lengths(masks: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """Return the bars of the histograms of tokens, a range each."""
    histograms = {"All tokens": masks["tokens_per_example"], "Trained tokens": masks["trained_tokens_per_example"]}
    return {name: draw_bars(histogram["counts"]) for name, histogram in histograms.items()}


def draw_bars(counts: Mapping[str, int]) -> list[Bar]:
    """Return a bar for each range of a histogram, as high as its count."""
    highest = max(counts.values(), default=1)
    return [Bar(label.replace("-", "–"), count, 100 * count / highest) for label, count in counts.items()]


def clip_text(text: str, most: int = MAX_TEXT) -> str:
    """Cut a long text and say how long it was."""
    return text if len(text) <= most else f"{text[:most]} … ({len(text):,} characters)"
