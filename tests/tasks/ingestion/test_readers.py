import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.ingestion.errors import DataError, RowError
from tasks.ingestion.sources import json_files, json_lists
from tasks.ingestion.sources.columnar import RawRow
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.json_lists import read_list
from tasks.ingestion.sources.readers import read_rows


def read(path: Path, kind: str) -> list[RawRow]:
    return list(read_rows(SourceFile(path, path.name, kind)))


def read_bytes(folder: Path, kind: str, data: bytes) -> list[tuple[int, Any]]:
    path = folder / f"rows.{kind}"
    path.write_bytes(data)
    return [(row.line, row.value) for row in read(path, kind)]


def test_json_may_be_a_list_one_object_or_an_object_a_line(tmp_path: Path) -> None:
    assert read_bytes(tmp_path, "json", b'[{"a": 1}, {"a": 2}]') == [(1, {"a": 1}), (2, {"a": 2})]
    assert read_bytes(tmp_path, "json", b'{"a": 1}') == [(1, {"a": 1})]
    assert read_bytes(tmp_path, "json", b'{"a": 1}\n\n{"a": 2}\n') == [(1, {"a": 1}), (3, {"a": 2})]
    assert read_bytes(tmp_path, "json", b" \n") == []


def test_lines_are_ended_by_line_feeds_alone(tmp_path: Path) -> None:
    data = '{"a": "x\u2028y\u0085z"}\r\n   \r\n{"a": 2}'.encode()
    assert read_bytes(tmp_path, "jsonl", data) == [(1, {"a": "x\u2028y\u0085z"}), (3, {"a": 2})]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, kind: str) -> None:
    data = b"a\n\xc3\xa9\n" if kind == "csv" else b'{"a": "\xc3\xa9"}'
    assert read_bytes(tmp_path, kind, b"\xef\xbb\xbf" + data) == [(1, {"a": "é"})]


@pytest.mark.parametrize(
    ("kind", "data", "where"),
    [
        (
            "json",
            b'[{"a": "caf\xe9"}]',
            "byte 12 (offset 11) is 0xE9, on line 1: save the file as UTF-8, by iconv -f ENCODING",
        ),
        ("jsonl", b'{"a": 1}\n{"a": "\xc4\xe3"}\n', "byte 17 (offset 16) is 0xC4, on line 2"),
        ("jsonl", b'\xef\xbb\xbf{"a": "\xff"}\n', "byte 11 (offset 10) is 0xFF, on line 1"),
        ("csv", b"a,b\n1,2\n\xff,4\n", "byte 9 (offset 8) is 0xFF, on line 3"),
        (
            "json",
            '[{"a": 1}]'.encode("utf-16"),
            "byte 1 (offset 0) is 0xFF, which begins UTF-16: save it as UTF-8, such as by iconv -f UTF-16",
        ),
        ("json", '[{"a": 1}]'.encode("utf-32"), "byte 1 (offset 0) is 0xFF, which begins UTF-32"),
        ("jsonl", '{"a": 1}'.encode("utf-16-le"), "byte 2 (offset 1) is 0x00"),
    ],
)
def test_other_encodings_are_refused_by_byte_and_offset(tmp_path: Path, kind: str, data: bytes, where: str) -> None:
    with pytest.raises(DataError, match="not UTF-8") as caught:
        read_bytes(tmp_path, kind, data)
    assert where in str(caught.value)
    assert f"rows.{kind}" in str(caught.value)


def test_broken_json_is_named_by_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.json: broken JSON on line 3, column 1 .*delimiter"):
        read_bytes(tmp_path, "json", b'[{"a": 1},\n{"a": 2}\n{"a": 3}]')


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["é", "\\", '"', "]", "🙂"]),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=4), values, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(
    values=st.lists(JSON, max_size=8),
    read_bytes_at_once=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
    bom=st.booleans(),
)
def test_list_read_in_parts_is_the_list(
    values: list[Any], read_bytes_at_once: int, indent: int | None, is_ascii: bool, bom: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    data = (b"\xef\xbb\xbf" if bom else b"") + text.encode("utf-8", "surrogatepass") + b" \n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lists, "READ_BYTES", read_bytes_at_once)
        read = list(read_list(io.BytesIO(data), lambda *_: pytest.fail("it is UTF-8")))
    assert json.dumps(read) == json.dumps(json.loads(text))


@pytest.mark.parametrize("read_bytes_at_once", [1, 7, 100])
@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b'[{"a": 1},\n{"a": 2}\n{"a": 3}]', r"broken JSON on line 3, column 1 \(Expecting ',' delimiter"),
        (b'[{"a": 1},\n{"a": 2}\n', r"broken JSON on line 3, column 1 \(Expecting ',' delimiter"),
        (b'[{"a": 1},\n{"a": 2}] x', r"broken JSON on line 2, column 11 \(Extra data\) near .*x'"),
        (b'[{"a": 1},\n {"a": tru}]', r"broken JSON on line 2, column 8 \(Expecting value"),
        (b'[{"a": 1}, ', r"broken JSON on line 1, column 12 \(Expecting value"),
        (b'[{"a": "b}]', r"broken JSON on line 1, column 8 \(Unterminated string"),
        (b'[{"a": 1},\n{"a": "caf\xe9"}]', r"not UTF-8: byte 22 \(offset 21\) is 0xE9, on line 2"),
        (b'\xef\xbb\xbf[{"a": "\xc4\xe3"}]', r"not UTF-8: byte 12 \(offset 11\) is 0xC4, on line 1"),
        (b"[" * 100_000, r"nested too deeply"),
    ],
)
def test_what_is_wrong_in_a_long_list_is_named_by_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, where: str, read_bytes_at_once: int
) -> None:
    monkeypatch.setattr(json_files, "PARSED_WHOLE_BYTES", 0)
    monkeypatch.setattr(json_lists, "READ_BYTES", read_bytes_at_once)
    with pytest.raises(DataError, match=where):
        read_bytes(tmp_path, "json", data)


def test_long_json_may_be_a_list_one_object_or_a_value_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "PARSED_WHOLE_BYTES", 0)
    assert read_bytes(tmp_path, "json", b' [ {"a": 1},\n {"a": 2} ] ') == [(1, {"a": 1}), (2, {"a": 2})]
    assert read_bytes(tmp_path, "json", b"[]") == []
    assert read_bytes(tmp_path, "json", b'{"a":\n1}') == [(1, {"a": 1})]
    assert read_bytes(tmp_path, "json", b'{"a": 1}\n\n{"a": 2}\n') == [(1, {"a": 1}), (3, {"a": 2})]
    assert read_bytes(tmp_path, "json", b"[1]\n[2]") == [(1, [1]), (2, [2])]


def test_broken_line_is_a_row_with_a_problem_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    one, two, three = read(path, "jsonl")
    assert (one.value, three.value, three.line) == ({"a": 1}, {"a": 3}, 3)
    assert isinstance(two.problem, RowError)
    assert (two.line, two.value) == (2, '{"a":')
    assert two.problem.reason == "broken_json"
    assert "line 2, column 6" in two.problem.detail


def test_jsonl_file_without_any_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no line is JSON \(broken JSON on line 1, column 2.*named \.json"):
        read_bytes(tmp_path, "jsonl", b"[\nhello\n")


def test_deep_nesting_is_an_error_and_no_crash(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with pytest.raises(DataError, match="nested too deeply"):
        read_bytes(tmp_path, "json", deep)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + deep)
    assert [row.problem is None for row in read(path, "jsonl")] == [True, False]


def test_csv_values_stay_text_over_lines_and_beyond_the_default_size(tmp_path: Path) -> None:
    long = b"x" * 200_000
    data = b'q,a\n007,"NA, ""null""\nsecond line"\n\n1e3,' + long + b"\n"
    assert read_bytes(tmp_path, "csv", data) == [
        (1, {"q": "007", "a": 'NA, "null"\nsecond line'}),
        (2, {"q": "1e3", "a": long.decode()}),
    ]
    assert read_bytes(tmp_path, "tsv", b"q\ta\n1,2\t3\n") == [(1, {"q": "1,2", "a": "3"})]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_lines_end_in_any_way(tmp_path: Path, end: str) -> None:
    data = end.join(["\ufeffa,b", "1,2", f'"x{end}y",4', ""]).encode()
    assert read_bytes(tmp_path, "csv", data) == [(1, {"a": "1", "b": "2"}), (2, {"a": f"x{end}y", "b": "4"})]


def test_csv_row_with_another_number_of_values_is_a_problem_of_that_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q,a\n1,2\n3\n4,5,6\n7,8\n")
    rows = read(path, "csv")
    assert [row.problem.reason if row.problem else None for row in rows] == [
        None,
        "wrong_column_count",
        "wrong_column_count",
        None,
    ]
    assert rows[2].problem is not None
    assert rows[2].problem.detail == "3 values under a header of 2, at line 4 of the file"


def test_csv_with_an_open_quote_or_a_doubled_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="broken CSV in the row that begins on line 3"):
        read_bytes(tmp_path, "csv", b'q,a\n1,2\n3,"4\n5,6\n')
    with pytest.raises(DataError, match="'a' more than once"):
        read_bytes(tmp_path, "csv", b"a,b,a\n1,2,3\n")


def test_parquet_and_both_arrow_forms_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"n": number, "m": [{"role": "user", "content": "é"}], "none": None} for number in range(2500)]
    table = pa.Table.from_pylist(rows)
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    expected = [RawRow(number, row) for number, row in enumerate(rows, start=1)]
    assert read(tmp_path / "rows.parquet", "parquet") == expected
    assert read(tmp_path / "file.arrow", "arrow") == expected
    assert read(tmp_path / "stream.arrow", "arrow") == expected


def test_maps_become_objects(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    table = pa.table({"m": pa.array([[("a", "1")], [("b", "2")]], type=kind)})
    with pa.ipc.new_file(tmp_path / "m.arrow", table.schema) as file:
        file.write_table(table)
    assert [row.value for row in read(tmp_path / "m.arrow", "arrow")] == [{"m": {"a": "1"}}, {"m": {"b": "2"}}]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("data", [b"", b"hello", b"PAR1hello", b"ARROW1hello"])
def test_broken_binary_files_are_named(tmp_path: Path, kind: str, data: bytes) -> None:
    with pytest.raises(DataError, match=rf"rows\.{kind}: not a readable"):
        read_bytes(tmp_path, kind, data)


def test_json_objects_gain_no_keys_from_their_neighbours(tmp_path: Path) -> None:
    rows = [{"arguments": {"city": "Bern"}}, {"arguments": {"text": "hi", "to": None}}]
    assert [value for _, value in read_bytes(tmp_path, "json", json.dumps(rows).encode())] == rows


MEASURE = """
import resource, sys
from pathlib import Path
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.readers import read_rows
path = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(1 for _ in read_rows(SourceFile(path, path.name, path.suffix[1:]))))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["list.json", "lines.json", "rows.jsonl", "rows.csv"])
def test_a_long_file_is_never_in_memory_as_a_whole(tmp_path: Path, name: str) -> None:
    path, text = tmp_path / name, "many words " * 90
    row = f"0,{text}\n" if name == "rows.csv" else json.dumps({"a": 0, "b": text})
    between = {"list.json": ",\n", "rows.csv": ""}.get(name, "\n")
    body = between.join([row] * 30_000)
    path.write_text({"list.json": f"[{body}]", "rows.csv": f"a,b\n{body}"}.get(name, body))
    assert path.stat().st_size > 28 << 20
    num_rows, kilobytes = subprocess.check_output([sys.executable, "-c", MEASURE, str(path)], text=True).split()
    assert int(num_rows) == 30_000
    assert int(kilobytes) < 16 << 10
