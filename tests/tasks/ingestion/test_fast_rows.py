"""What is fast is what is slow: for every row, the quick way and the plain one give the same."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import ftfy
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.ingestion.errors import RowError
from tasks.ingestion.intake import identify_rows
from tasks.ingestion.rows.conversations import Converted
from tasks.ingestion.rows.identity import make_conversation, make_plain_conversation, normalize_text
from tasks.ingestion.rows.messages import read_messages
from tasks.ingestion.rows.quality import ODD, find_text_problems
from tasks.ingestion.rows.screening import SUSPECT, Screen, find_spans
from tasks.ingestion.sources.columnar import RawRow
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.readers import read_rows

BODY = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
PERSONAL = ["ann@acme.org", "+41 44 668 18 00", "(650) 253-0000", "650-253-0000", "138 9634 7215", "请拨打13896347215"]
SECRETS = [f"ghp_{BODY}", f"hf_{BODY}", f"sk-{BODY}", "AKIAQ3EGRT5XYZ2LMNOP", "postgres://bob:hunter2x@db.acme.org/x"]
SECRETS += [
    "xoxb-123456789012-a",
    f"SG.{BODY[:22]}.{BODY}{BODY[:7]}",
    f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{BODY}",
]
SECRETS += ["-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq1vZkq9Xc0\nq0mFh2Kk\n-----END RSA PRIVATE KEY-----"]
ODDITIES = [
    "It doesn\u00e2\u20ac\u2122t",
    "caf\u00c3\u00a9",
    "\x00",
    "\x1b",
    "\x7f",
    "\x85",
    "\ufffd",
    "\ud83d",
    "\u2028",
]
PLAIN = [
    "word",
    " ",
    "  ",
    "\n",
    "\t",
    '"',
    "\\\\",
    "\\",
    "é",
    "“quoted” — it’s",
    "你好",
    "1984",
    "\xa0",
    "ß",
    "Ａ",
    "\x1c",
]
TEXT = st.lists(st.sampled_from(PERSONAL + SECRETS + ODDITIES + PLAIN * 3) | st.text(max_size=3), max_size=8).map(
    "".join
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool"])
CALL = {"type": "function", "function": {"name": "f", "arguments": {"to": "ann@acme.org"}}}
EXTRA: st.SearchStrategy[dict[str, Any]] = st.sampled_from(
    [{}, {}, {}, {"train": False}, {"reasoning_content": "at ann@acme.org"}, {"tool_calls": [CALL]}]
)
MESSAGE = st.tuples(ROLE, TEXT, EXTRA).map(lambda parts: {"role": parts[0], "content": parts[1], **parts[2]})
ROW = st.tuples(st.lists(MESSAGE, min_size=1, max_size=4), st.sampled_from([None, None, [CALL]]))


@given(rows=st.lists(ROW, max_size=6), screen=st.sampled_from(["off", "report", "redact"]))
def test_rows_looked_at_together_are_those_looked_at_one_by_one(rows: list[Any], screen: Screen) -> None:
    converted = [(RawRow(line, None), Converted(*row)) for line, row in enumerate(rows, start=1)]
    expected, refused = [], []
    for row, (messages, tools, _) in converted:
        try:
            expected.append(make_conversation(messages, tools, "a.json", row.line, screen))
        except RowError as error:
            refused.append((row, error.args))
    conversations, unwritable = identify_rows(converted, "a.json", screen)
    assert conversations == expected
    assert [(row, error.args) for row, error in unwritable] == refused


def test_messages_of_a_role_and_a_content_go_the_fast_way_and_others_do_not() -> None:
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert make_plain_conversation(plain, "a.json", 1) == make_conversation(plain, None, "a.json", 1)
    assert make_plain_conversation([{**plain[0], "train": True}], "a.json", 1) is None
    assert make_plain_conversation([{"role": "user", "content": "\ud83d"}], "a.json", 1) is None


@pytest.mark.parametrize("secret", PERSONAL + SECRETS)
def test_what_is_found_is_suspected_first(secret: str) -> None:
    assert find_spans(f"a {secret} b")
    assert pl.Series([json.dumps(f"a {secret} b", ensure_ascii=False)]).str.contains(SUSPECT).item()


@given(
    role=st.sampled_from(["user", "human", "assistant", "system", "function_call", "tool", "x", "", None, 1, ["user"]]),
    content=st.sampled_from(["", "text", '{"name": "f"}', None, 1, ["a"], [{"type": "text", "text": "b"}]]),
    key=st.sampled_from(["content", "value", "text"]),
)
def test_plain_messages_are_read_as_those_with_a_further_key(role: Any, content: Any, key: str) -> None:
    def read(message: dict[str, Any]) -> Any:
        try:
            return read_messages([message])
        except RowError as error:
            return error.args

    message = {"role": role, key: content}
    described = str(read({**message, "name": None})).replace(", name", "")
    assert str(read(message)) == described


# All characters that ftfy's pattern knows, and those around them.
BAD = st.text(alphabet=sorted({*ftfy.badness.BADNESS_RE.pattern, *map(chr, range(256))}), min_size=1, max_size=6)


@given(texts=st.lists(BAD, min_size=1, max_size=200))
def test_text_with_a_problem_is_odd(texts: list[str]) -> None:
    odd = pl.Series([json.dumps(text, ensure_ascii=False) for text in texts]).str.contains(ODD)
    assert not [text for text, suspected in zip(texts, odd, strict=True) if find_text_problems(text) and not suspected]


@given(text=TEXT.filter(lambda text: "\ud83d" not in text))
def test_normalization_by_bytes_is_that_by_characters(text: str) -> None:
    assert normalize_text(text).decode() == " ".join(unicodedata.normalize("NFKC", text).casefold().split())


NUMBERS = [
    "0",
    "-0",
    "-0.0",
    "1e400",
    "-1E400",
    "0.1",
    "1e22",
    "5e-324",
    "1.7976931348623159e308",
    "2" * 18,
    "-" + "9" * 19,
]
NUMBERS += ["18446744073709551616", "1" * 400, "0." + "1" * 40, "NaN", "-Infinity", "Infinity"]
OTHERS = ['"\\\\ud800"', '"\\u0000"', '"\x7f"', "true", "null", '{"a": 1, "a": 2}', '{"a": {"b": null}}', "[[]]"]
BROKEN = ["01", "+1", ".5", "1.", "tru", '"\t"', "{,}", "[1,]", "'a'", "{} {}", "\x0c1", "[" * 1010 + "]" * 1010]
SPACES = st.sampled_from(["", " ", "\t", "\u3000", "\x1c"])


@given(value=st.sampled_from(NUMBERS + OTHERS + BROKEN), before=SPACES, after=SPACES)
def test_json_is_read_as_json_reads_it(value: str, before: str, after: str, tmp_path_factory: Any) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "value.jsonl"
    path.write_text(f'{before}{value}{after}\n{{"last": 1}}\n', encoding="utf-8")
    (row, _) = read_rows(SourceFile(path, "value.jsonl", "jsonl"))
    try:
        expected = json.loads((before + value + after).strip())
    except (json.JSONDecodeError, RecursionError):
        assert row.problem is not None
    else:
        assert row.problem is None
        assert repr(row.value) == repr(expected)
