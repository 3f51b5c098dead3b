"""The two errors of ingestion: a dataset that cannot be used, and a row with one of the fixed reasons."""

REASONS: dict[str, str] = {
    "broken_json": "the line is not JSON",
    "too_large": "the row has more text than is read of one",
    "not_an_object": "the row is JSON, but not an object with named fields",
    "wrong_column_count": "the CSV row has more or fewer values than the header",
    "missing_field": "a required field is absent",
    "null_content": "a required text is null",
    "unreadable_value": "a value of the row cannot be read from its file",
    "not_text": "a text is wanted, and another type was found",
    "broken_text": "the text holds half of a surrogate pair, which no encoding can write",
    "bad_message": "a message is not an object with a role and a content",
    "bad_history": "history is not a list of question and answer pairs",
    "bad_tools": "the tool definitions are not a JSON list of functions",
    "bad_tool_call": "a tool call has no name, or its arguments are not a JSON object",
    "bad_train_flag": "the train flag of a message is neither true nor false, or contradicts another one",
    "unread_meaning": "a column or message key changes what the row means, and is not understood here",
    "rated_bad": "the row says that its answer is a bad one",
    "unknown_role": "a role is not one of system, user, assistant, tool or a known alias",
    "wrong_role_order": "the roles do not follow system?, user, assistant, (tool, assistant)*, user, …",
    "empty_conversation": "there is no message",
    "empty_prompt": "a user message has no text",
    "empty_answer": "an assistant message has neither text nor a tool call",
    "no_assistant": "no message is the assistant's",
    "ends_with_user": "the last message is the user's: nothing answers it",
    "ends_with_tool": "the last message is a tool's result: nothing answers it",
    "nothing_to_train": "every assistant message says train: false",
    "same_answers": "the chosen and the rejected answer are the same",
    "different_prompts": "the chosen and the rejected answer do not stand behind the same prompt",
}


_OF_ROWS = (".csv", ".tsv", ".parquet", ".arrow")
"""Endings of files whose rows are numbered, and are no lines."""


def name_place(source: str, number: int) -> str:
    """Return where a row is, as a person finds it: `rows.jsonl:7` is a line, `rows.csv row 7` is below the header."""
    return f"{source} row {number}" if source.lower().endswith(_OF_ROWS) else f"{source}:{number}"


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
