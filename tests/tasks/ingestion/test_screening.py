import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import DataConfig
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.rows.identity import make_conversation
from tasks.ingestion.rows.screening import find_spans, may_hold_any, redact_text, screen_values
from tests.tasks.ingestion.conftest import WriteLines

BODY = "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq1vZkq9Xc0\nq0mFh2Kk\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("write to ann.lee+x@mail.acme.co.uk.", "write to [EMAIL]."),
        ("邮箱abc@qq.com。", "邮箱[EMAIL]。"),
        ("<bob@acme.org>, eve@acme.org", "<[EMAIL]>, [EMAIL]"),
        ("Phone:+41 44 668 18 00!", "Phone:[PHONE]!"),
        ("+1 (650) 253-0000", "[PHONE]"),
        ("call (650) 253-0000 or 650-253-0000.", "call [PHONE] or [PHONE]."),
        ("请拨打13896347215联系我", "请拨打[PHONE]联系我"),
        ("138 9634 7215", "[PHONE]"),
        ("key AKIAQ3EGRT5XYZ2LMNOP here", "key [TOKEN] here"),
        (f"export GH=ghp_{BODY}", "export GH=[TOKEN]"),
        (f"'sk-proj-{BODY}'", "'[TOKEN]'"),
        ("sk-0123456789abcdef0123456789abcdef", "[TOKEN]"),
        (f"hf_{BODY}", "[TOKEN]"),
        (f"glpat-{BODY[:20]} xoxb-123456789012-{BODY}", "[TOKEN] [TOKEN]"),
        (f"Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{BODY}", "Bearer [TOKEN]"),
        (f"before\n{PEM}\nafter", "before\n[PRIVATE_KEY]\nafter"),
        (PEM.replace("\n", "\\n"), "[PRIVATE_KEY]"),
        ("postgres://bob:hunter2x@db.acme.org/x", "postgres://bob:[PASSWORD]@db.acme.org/x"),
    ],
)
def test_what_is_found_becomes_its_placeholder(text: str, redacted: str) -> None:
    assert redact_text(text) == redacted
    assert may_hold_any(text)
    assert may_hold_any(json.dumps(text, ensure_ascii=False))


@pytest.mark.parametrize(
    "text",
    [
        "jane@example.com, joe@mail.example.org, x@host.test, git@github.com:a/b.git, logo@2x.png, @decorator",
        "pi is 3.14159265358979, +1.23456789, 40.730610, -73.935242, 1914-1918, 2023-01-02 10:11:12, 1633049473",
        "15032385536 bytes, ISBN 978-3-16-148410-0, 192.168.100.1000, 123-456-7890, 650-555-0123, +1234567890",
        "order 20230101-13896347215-99, v1.13896347215",
        "<div class='sk-folding-cube-and-some-other-words'>, task-management-for-everybody-1, sk-your-key-1234567890",
        "AKIAIOSFODNN7EXAMPLE, hf_XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX, ghp_short1",
        "api_key = 'YOUR_API_KEY', password = 'mypassword123'",
        "mysql://root:password@localhost, http://host:8080/a@b, https://acme.org/@name",
        "-----BEGIN PRIVATE KEY----- is how a key begins, -----BEGIN PUBLIC KEY-----",
        "",
    ],
)
def test_what_only_looks_alike_is_left_alone(text: str) -> None:
    assert find_spans(text) == []


def test_a_private_key_without_its_end_is_found_to_the_end_of_its_letters() -> None:
    cut = PEM.partition("-----END")[0]
    assert redact_text(f"{cut}") == "[PRIVATE_KEY]"


PIECE = st.sampled_from(
    [*"a1@.+:/- (=\n", "é", "你", "ann@acme.org", "+41 44 668 18 00", "650-253-0000", PEM, f"ghp_{BODY}", "138"]
)
TEXT = st.lists(PIECE | st.text(max_size=4), max_size=14).map("".join)


@given(text=TEXT)
def test_spans_are_apart_and_in_order_and_the_quick_look_misses_nothing(text: str) -> None:
    spans = find_spans(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(before.end <= after.start for before, after in pairwise(spans))
    assert may_hold_any(text) or not spans
    if not spans:
        assert redact_text(text) == text


VALUE = st.recursive(TEXT | st.none() | st.booleans() | st.integers(), lambda x: st.lists(x) | st.dictionaries(TEXT, x))


@given(value=VALUE)
def test_report_and_redact_count_the_same_and_only_redact_changes_texts(value: Any) -> None:
    reported: Counter[str] = Counter()
    redacted: Counter[str] = Counter()
    assert screen_values(value, reported, redact=False) is value
    changed = screen_values(value, redacted, redact=True)
    assert reported == redacted
    assert (changed == value) == (not reported)


def test_tool_calls_and_tools_are_looked_at_too_and_names_are_not() -> None:
    call = {"function": {"name": "mail", "arguments": {"ann@acme.org": "eve@acme.org"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Mail her."},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "She is eve@acme.org"},
    ]
    tools = [{"type": "function", "function": {"name": "mail", "description": "as bob@acme.org"}}]
    row = make_conversation(messages, tools, "rows.json", 1, "redact")
    assert row.found == ("email",) * 3
    assert "ann@acme.org" in row.messages
    assert "eve@acme.org" not in row.messages
    assert row.tools == json.dumps(tools).replace("bob@acme.org", "[EMAIL]")
    assert make_conversation(messages, tools, "rows.json", 1).found == ()


ROWS = [
    {"prompt": "Who?", "completion": "ann@acme.org"},
    {"prompt": "Who?", "completion": "bob@acme.org and eve@acme.org"},
    {"prompt": "Call", "completion": f"+41 44 668 18 00, hf_{BODY}"},
    *({"prompt": f"p {number}", "completion": "c"} for number in range(20)),
    {"prompt": "mail joe@acme.org", "completion": ""},
]
SECRETS = ["ann@acme", "eve@acme", "joe@acme", "668 18", BODY]


def build(folder: Path, source: Path, screen: str) -> tuple[Any, str]:
    config = DataConfig.model_validate({"source": str(source), "screen": screen, "max_rejected_fraction": 1.0})
    build_dataset(config, seed=0, folder=folder)
    tables = [pl.read_parquet(folder / f"{side}.parquet") for side in ("train", "eval")]
    return json.loads((folder / "quality.json").read_text(encoding="utf-8")), "\n".join(pl.concat(tables)["messages"])


def test_report_counts_with_places_and_never_says_the_secret(tmp_path: Path, write_lines: WriteLines) -> None:
    quality, texts = build(tmp_path / "out", write_lines("rows.jsonl", ROWS), "report")
    assert quality["screen"]["mode"] == "report"
    found = quality["screen"]["found"]
    assert (found["email"]["num_rows"], found["email"]["num_found"]) == (2, 3)
    assert set(found["email"]["places"]) == {"rows.jsonl:1", "rows.jsonl:2"}
    assert (found["phone"]["num_found"], found["token"]["num_found"], found["password"]["num_rows"]) == (1, 1, 0)
    assert any(warning.startswith("2 rows hold 3 e-mail addresses, kept") for warning in quality["warnings"])
    written = json.dumps(quality) + pl.read_parquet(tmp_path / "out" / "rejects.parquet").write_json()
    assert not [secret for secret in SECRETS if secret in written]
    assert "mail [EMAIL]" in written
    assert "ann@acme.org" in texts


def test_redact_replaces_before_rows_get_their_identity(tmp_path: Path, write_lines: WriteLines) -> None:
    quality, texts = build(tmp_path / "out", write_lines("rows.jsonl", ROWS), "redact")
    assert not [secret for secret in SECRETS if secret in texts]
    assert "[EMAIL] and [EMAIL]" in texts
    assert quality["screen"]["found"]["email"]["num_found"] == 3
    same = [{"prompt": "Who?", "completion": f"{name}@acme.org"} for name in ("ann", "bob")]
    quality, _ = build(tmp_path / "same", write_lines("same.jsonl", [*ROWS[3:10], *same]), "redact")
    assert quality["counts"]["rows_duplicate"] == 1


def test_off_looks_at_nothing(tmp_path: Path, write_lines: WriteLines) -> None:
    quality, texts = build(tmp_path / "out", write_lines("rows.jsonl", ROWS), "off")
    assert {entry["num_found"] for entry in quality["screen"]["found"].values()} == {0}
    assert "ann@acme.org" in texts
    assert "joe@acme.org" in pl.read_parquet(tmp_path / "out" / "rejects.parquet")["raw"][0]


def test_material_has_no_false_tokens_keys_or_phones(
    material: Path,
) -> None:
    found: Counter[str] = Counter()
    for name in ("gpteacher", "llamafactory", "tinker"):
        for path in sorted((material / name).iterdir()):
            text = path.read_text(encoding="utf-8")
            values = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
            screen_values(values, found, redact=False)
    assert found == {"email": 38, "password": 10}
