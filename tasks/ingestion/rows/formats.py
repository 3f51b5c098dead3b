"""The table of formats: a format is one row of it, its columns and its converter together."""

from dataclasses import dataclass

from tasks.ingestion.rows.converters import (
    Converter,
    convert_messages,
    convert_moss,
    convert_pair,
    convert_prompt_completion,
    convert_tree,
    convert_xlam,
)
from tasks.ingestion.rows.preferences import CHOSEN, PROMPTS, REJECTED, convert_side

Names = tuple[str, ...]
"""The names by which a column goes, ours first."""
SYSTEM: Names = ("system", "system_prompt")
TOOLS: Names = ("tools", "functions")


@dataclass(frozen=True)
class Format:
    """A way of writing conversations as rows."""

    required: tuple[Names, ...]
    """Columns that every row has."""
    optional: tuple[Names, ...]
    convert: Converter
    """Makes the messages of a row; `system` and `tools` are read for all formats alike."""
    convert_rejected: Converter | None = None
    """Makes those with the answer that is not preferred, where rows are pairs."""

    @property
    def fields(self) -> Names:
        """Our names of all columns."""
        return tuple(names[0] for names in (*self.required, *self.optional))


COMMON = (SYSTEM, TOOLS)
INPUT: Names = ("input", "context")

# In the order of preference where a row has the columns of several.
FORMATS: dict[str, Format] = {
    "messages": Format((("messages",),), COMMON, convert_messages("messages")),
    "sharegpt": Format((("conversations", "conversation"),), COMMON, convert_messages("conversations")),
    "xlam": Format((("query",), ("answers",), ("tools",)), (SYSTEM,), convert_xlam),
    "oasst_tree": Format((("prompt",), ("message_tree_id",)), COMMON, convert_tree),
    "moss": Format((("chat",), ("meta_instruction",)), (TOOLS,), convert_moss),
    "alpaca": Format(
        (("instruction",), ("output", "response")),
        (INPUT, ("history",), *COMMON),
        convert_pair("instruction", "output"),
    ),
    "instruct": Format((("instruct",), ("label",)), (INPUT, *COMMON), convert_pair("instruct", "label")),
    "prompt_completion": Format((("prompt",), ("completion", "response")), COMMON, convert_prompt_completion),
    "question_answer": Format(
        (("question",), ("answer", "response")), (("context",), *COMMON), convert_pair("question", "answer", "context")
    ),
    "query_response": Format((("query",), ("response",)), (("history",), *COMMON), convert_pair("query", "response")),
    "input_output": Format((("input",), ("output", "target")), COMMON, convert_pair("input", "output", "")),
    # Asked for by name alone: training.objective dpo does.
    "preference": Format(
        (CHOSEN, REJECTED),
        (PROMPTS, INPUT, ("history",), *COMMON),
        convert_side(CHOSEN[0]),
        convert_side(REJECTED[0]),
    ),
}
