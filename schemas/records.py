"""pandera schemas (polars) of the tables that cross a stage's border.

Structured values travel as JSON text: a struct column would gain null keys from its neighbours' rows.
"""

from typing import Any

import pandera.polars as pa


class Conversations(pa.DataFrameModel):
    """train.parquet and eval.parquet of a dataset: a conversation a row."""

    example_id: str = pa.Field(str_length={"min_value": 16, "max_value": 64})
    """Hexadecimal digest of the canonical conversation; follows the row to the evaluation table."""
    source: str
    """File (relative to the dataset) or hub name."""
    line: int = pa.Field(ge=1)
    """1-based: the line of a JSONL file, else the row's number."""
    messages: str
    """JSON list of messages: role, content, and what else the template reads (tool_calls, reasoning_content, train)."""
    tools: str = pa.Field(nullable=True)
    """JSON list of tool definitions."""
    rejected: str = pa.Field(nullable=True, str_startswith="[")
    """JSON list of the messages of the same prompt with the answer that is not preferred, where the row is a pair."""

    class Config:
        strict = True


class Rejects(pa.DataFrameModel):
    """rejects.parquet: a row that is not used, with where and why."""

    example_id: str
    """Digest of the raw row."""
    source: str
    line: int = pa.Field(ge=1)
    reason: str
    """A short fixed code, such as empty_answer; counted by it."""
    detail: str
    """A sentence for a person."""
    raw: str
    """The row as JSON or raw text, at most 2,000 characters."""

    class Config:
        strict = True


class Examples(pa.DataFrameModel):
    """train.parquet and eval.parquet of the tokens: an example a row, plus list columns input_ids, labels (int32)."""

    example_id: str
    """Several examples share it when a conversation had to become several."""
    question: str
    """Last user message, for people."""
    reference: str
    """Last assistant message: what the answer is compared with."""

    class Config:
        strict = False


class EvaluationRows(pa.DataFrameModel):
    """rows.parquet of an evaluation: one held-out example a row, plus a column for each metric of the table."""

    example_id: str
    question: str
    reference: str
    answer: str
    """Decoded greedy answer, without special tokens."""
    nll_sum: float = pa.Field(ge=0)
    """Negative log-likelihood of the reference's tokens and end of turn, in nats, summed."""
    num_tokens: int = pa.Field(ge=1)
    """Tokens in that sum."""

    class Config:
        strict = False  # the metrics of the table: tasks.evaluation.scoring.validate_rows


class PairRows(pa.DataFrameModel):
    """What rows.parquet has besides where the held-out rows are pairs of answers."""

    chosen_nll: float = pa.Field(ge=0)
    """Negative log-likelihood of the chosen answer, all its trained tokens, in nats, summed."""
    chosen_tokens: int = pa.Field(ge=1)
    rejected_nll: float = pa.Field(ge=0)
    rejected_tokens: int = pa.Field(ge=1)

    class Config:
        strict = True


def columns_of(model: type[pa.DataFrameModel]) -> dict[str, Any]:
    """Return a table's columns with their polars types: the one place that they are written down is its model."""
    return {name: column.dtype.type for name, column in model.to_schema().columns.items()}
