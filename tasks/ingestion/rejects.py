"""Rows that are not used: the fixed reasons, their table, and the budget that fails a run."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from tasks.ingestion.screening import Screen, redact_text

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


def count_reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """Return the number of rejects by reason, the most frequent first."""
    return dict(Counter(reject.reason for reject in rejects).most_common())


def describe_rejects(rejects: Sequence[Reject]) -> str:
    """List each reason with its count, its first places and the first detail, a line a reason."""
    lines = []
    for reason, count in count_reasons(rejects).items():
        of_reason = [reject for reject in rejects if reject.reason == reason]
        places = ", ".join(f"{reject.source}:{reject.line}" for reject in of_reason[:PLACES_SHOWN])
        more = ", …" if count > PLACES_SHOWN else ""
        lines.append(f"  {count} x {reason} ({REASONS[reason]}): {places}{more}\n    first: {of_reason[0].detail}")
    return "\n".join(lines)


def check_budget(rejects: Sequence[Reject], num_rows: int, max_fraction: float, where: str) -> None:
    """Fail when more than `max_fraction` of `num_rows` rows are rejected.

    Raises:
        DataError: names the counts by reason, the first places and the remedy.
    """
    if not rejects or len(rejects) <= max_fraction * num_rows:
        return
    part = len(rejects) / num_rows
    raise DataError(
        f"{where}: {len(rejects)} of {num_rows} rows ({part:.1%}) are rejected, and data.max_rejected_fraction "
        f"allows {max_fraction:.1%}:\n{describe_rejects(rejects)}\n"
        "Repair or remove these rows, or raise data.max_rejected_fraction to train without them."
    )
