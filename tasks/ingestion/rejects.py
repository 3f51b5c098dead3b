"""Rows that are not used: the fixed reasons, their table, and the budget that fails a run."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tasks.ingestion.rows.screening import Screen, redact_text

REASONS: dict[str, str] = {
    "broken_json": "the line is not JSON",
    "not_an_object": "the row is JSON, but not an object with named fields",
    "wrong_column_count": "the CSV row has more or fewer values than the header",
    "missing_field": "a required field is absent",
    "null_content": "a required text is null",
    "not_text": "a text is wanted, and another type was found",
    "broken_text": "the text holds half of a surrogate pair, which no encoding can write",
    "bad_message": "a message is not an object with a role and a content",
    "bad_history": "history is not a list of question and answer pairs",
    "bad_tools": "the tool definitions are not a JSON list of functions",
    "bad_tool_call": "a tool call has no name, or its arguments are not a JSON object",
    "bad_train_flag": "the train flag of a message is neither true nor false",
    "unknown_role": "a role is not one of system, user, assistant, tool or a known alias",
    "wrong_role_order": "the roles do not follow system?, user, assistant, (tool, assistant)*, user, …",
    "empty_conversation": "there is no message",
    "empty_prompt": "a user message has no text",
    "empty_answer": "an assistant message has neither text nor a tool call",
    "no_assistant": "no message is the assistant's",
    "ends_with_user": "the last message is the user's: nothing answers it",
    "ends_with_tool": "the last message is a tool's result: nothing answers it",
    "nothing_to_train": "every assistant message says train: false",
}
MAX_RAW_CHARACTERS = 2000
PLACES_SHOWN = 5
FIRST_SHOWN = 10


class DataError(ValueError):
    """A dataset that cannot be used; the message says what, where, the limit and the way out."""


class RowError(ValueError):
    """One row that cannot be used: a reason of REASONS and a sentence for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason, detail)

    @property
    def reason(self) -> str:
        """Fixed code, by which rejects are counted."""
        return str(self.args[0])

    @property
    def detail(self) -> str:
        """What exactly was found."""
        return str(self.args[1])


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
    text = raw if isinstance(raw, str) else json.dumps(raw, ensure_ascii=False, default=str)
    # "replace" turns half surrogates into question marks: the tables are UTF-8.
    data = text.encode("utf-8", "replace")
    hide = redact_text if screen != "off" else str
    return Reject(
        example_id=hashlib.sha256(data).hexdigest()[:32],
        source=source,
        line=line,
        reason=error.reason,
        detail=hide(error.detail.encode("utf-8", "replace").decode()),
        raw=hide(data.decode())[:MAX_RAW_CHARACTERS],
    )


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
                places.append(f"{reject.source}:{reject.line}")
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
