"""Rows that are not used: their table, their numbers by reason, and the budget that fails a run."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tasks.ingestion.errors import REASONS, DataError, RowError, name_place
from tasks.ingestion.rows.screening import Screen, redact_text

MAX_RAW_CHARACTERS = 2000
_SCREENED_CHARACTERS = 10 * MAX_RAW_CHARACTERS
"""Of what is kept, and what follows it: a secret may go beyond. A broken row of gigabytes would take minutes."""
PLACES_SHOWN = 5
FIRST_SHOWN = 10


class Reject(NamedTuple):
    """A row of rejects.parquet."""

    example_id: str
    source: str
    line: int
    reason: str
    detail: str
    raw: str


def make_reject(source: str, line: int, error: RowError, raw: Any, screen: Screen = "off") -> Reject:
    """Record a rejected row; `raw` is its text, or the parsed value when it was parsed.

    Rejects are shown in reports: personal data and secrets become placeholders in them, unless `screen` is off.
    """
    text = raw if isinstance(raw, str) else _write_raw(raw)
    # "replace" turns half surrogates into question marks: the tables are UTF-8.
    data = text.encode("utf-8", "replace")
    hide = redact_text if screen != "off" else str
    return Reject(
        example_id=hashlib.sha256(data).hexdigest()[:32],
        source=source,
        line=line,
        reason=error.reason,
        detail=hide(error.detail[:_SCREENED_CHARACTERS].encode("utf-8", "replace").decode()),
        raw=hide(text[:_SCREENED_CHARACTERS].encode("utf-8", "replace").decode())[:MAX_RAW_CHARACTERS],
    )


def _write_raw(raw: Any) -> str:
    """Write a parsed row as JSON, or say what it is where it is nested too deeply or holds a number too long."""
    try:
        return json.dumps(raw, ensure_ascii=False, default=str)
    except (ValueError, RecursionError) as error:
        keys = ", ".join(map(str, raw)) if isinstance(raw, dict) else type(raw).__name__
        return f"({keys}: cannot be written: {error})"


@dataclass
class Tally:
    """How many rows are rejected, and what is said of them."""

    counts: Counter[str] = field(default_factory=Counter)
    """By reason."""
    places: dict[str, list[str]] = field(default_factory=dict)
    """The first of each reason."""
    details: dict[str, str] = field(default_factory=dict)
    """The first of each reason."""
    first: list[Reject] = field(default_factory=list)

    def add(self, rejects: Iterable[Reject]) -> None:
        """Count further rejects."""
        for reject in rejects:
            self.counts[reject.reason] += 1
            places = self.places.setdefault(reject.reason, [])
            if len(places) < PLACES_SHOWN:
                places.append(name_place(reject.source, reject.line))
            self.details.setdefault(reject.reason, reject.detail)
            if len(self.first) < FIRST_SHOWN:
                self.first.append(reject)

    @property
    def by_reason(self) -> dict[str, int]:
        """Number of rejects by reason, the most frequent first."""
        return dict(self.counts.most_common())


def join_tallies(tallies: Iterable[Tally]) -> Tally:
    """Add up the rejects of several datasets, in their order."""
    whole = Tally()
    for tally in tallies:
        whole.counts.update(tally.counts)
        for reason, places in tally.places.items():
            whole.places[reason] = [*whole.places.get(reason, []), *places][:PLACES_SHOWN]
            whole.details.setdefault(reason, tally.details[reason])
        whole.first = [*whole.first, *tally.first][:FIRST_SHOWN]
    return whole


def describe_rejects(rejects: Tally) -> str:
    """List each reason with its count, its first places and the first detail, a line a reason."""
    lines = []
    for reason, count in rejects.by_reason.items():
        places = ", ".join(rejects.places[reason])
        more = ", …" if count > PLACES_SHOWN else ""
        lines.append(f"  {count} x {reason} ({REASONS[reason]}): {places}{more}\n    first: {rejects.details[reason]}")
    return "\n".join(lines)


def check_budget(rejects: Tally, num_rows: int, max_fraction: float, where: str) -> None:
    """Fail when more than `max_fraction` of `num_rows` rows are rejected.

    Raises:
        DataError: names the counts by reason, the first places and the remedy.
    """
    num_rejects = rejects.counts.total()
    if not num_rejects or num_rejects <= max_fraction * num_rows:
        return
    part = num_rejects / num_rows
    raise DataError(
        f"{where}: {num_rejects} of {num_rows} rows ({part:.1%}) are rejected, and data.max_rejected_fraction "
        f"allows {max_fraction:.1%}:\n{describe_rejects(rejects)}\n"
        "Repair or remove these rows, or raise data.max_rejected_fraction to train without them."
    )
