"""JSON lists and CSV read in parts are what they are read whole, whatever is quoted, escaped or broken in them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.ingestion.errors import DataError
from tasks.ingestion.sources import json_files
from tasks.ingestion.sources.columnar import RawRow
from tasks.ingestion.sources.files import SourceFile
from tasks.ingestion.sources.readers import read_rows
from tasks.ingestion.sources.separators import Start, find_csv_starts, find_list_starts
from tasks.ingestion.spans import divide

BOM = b"\xef\xbb\xbf"
# Whatever a state depends on is drawn often.
TEXTS = st.text(st.sampled_from('"\\,[]{}\n\r\t :;aé\u2028😀'), max_size=12)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(-(10**25), 10**25), st.none(), st.booleans(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
ROWS = st.lists(VALUES, min_size=1, max_size=12)


def step_through_list(data: bytes) -> list[Start]:
    """The oracle: every element behind the first, by a machine that takes one character after the other."""
    front = len(BOM) if data.startswith(BOM) else 0
    starts, place, row, line, column = [], front, 1, 1, 1
    depth, in_string, escaped = 0, False, False
    for character in data[front:].decode():
        place += len(character.encode())
        line, column = (line + 1, 1) if character == "\n" else (line, column + 1)
        if character == "\\":
            escaped = not escaped
            continue
        if character == '"' and not escaped:
            in_string = not in_string
        elif not in_string and character in "[{":
            depth += 1
        elif not in_string and character in "]}":
            depth -= 1
            if depth <= 0:
                break
        elif not in_string and character == "," and depth == 1:
            row += 1
            starts.append(Start(place, row, line, column))
        escaped = False
    return [start for start in starts if start.place < len(data)]


def step_through_csv(data: bytes, delimiter: str) -> list[Start]:
    """The oracle: every row behind the first that begins after a line feed, as csv's own machine goes on."""
    front = len(BOM) if data.startswith(BOM) else 0
    starts, state, place, num_rows, line, header = [], "row", front, 0, 1, 0
    text = data[front:].decode()
    for number, character in enumerate(text):
        place += len(character.encode())
        ends_line = character == "\n" or (character == "\r" and text[number + 1 : number + 2] != "\n")
        line += ends_line
        if state == "quoted":
            state = "quote" if character == '"' else "quoted"
        elif character == '"' and state in ("row", "value", "quote"):
            state = "quoted"
        elif character in "\r\n":
            num_rows += state != "row"
            state = "row"
            if ends_line and num_rows == 1 and not header:
                header = place
            if ends_line and character == "\n" and num_rows >= 2:
                starts.append(Start(place, num_rows, line, 1, header))
        else:
            state = "value" if character == delimiter else "plain"
    return [start for start in starts if start.place < len(data)]


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def write_list(rows: list[Any], indent: int | None, ascii_: bool) -> bytes:
    return json.dumps(rows, indent=indent, ensure_ascii=ascii_).encode()


def write_table(rows: list[list[str]], ends: str, delimiter: str) -> bytes:
    """Write a table with quotes around what needs them; csv's own writer leaves some out."""

    def quote(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if set(value) & set('",\r\n\t') or not value else value

    return "".join(delimiter.join(map(quote, row)) + ends for row in [["one", "two"], *rows]).encode()


def read(path: Path, kind: str, data: bytes, shard_bytes: int) -> tuple[list[RawRow], str, int]:
    """Return the rows of all spans, what is wrong with the file, and the number of spans."""
    path.write_bytes(data)
    file = SourceFile(path, path.name, kind)
    spans = [span for span, _ in divide(file, shard_bytes)]
    rows: list[RawRow] = []
    try:
        for span in spans:
            rows += read_rows(file, span)
        if not spans:
            rows += read_rows(file)
    except DataError as error:
        return [], str(error).partition(" near ")[0], len(spans)
    return [RawRow(row.line, row.value, str(row.problem) if row.problem else None) for row in rows], "", len(spans)  # type: ignore[arg-type]


@given(ROWS, st.sampled_from([None, 0, 2]), st.booleans(), st.booleans(), st.integers(1, 40))
def test_elements_of_a_list_are_where_the_oracle_finds_them(
    rows: list[Any], indent: int | None, ascii_: bool, has_mark: bool, block: int
) -> None:
    data = BOM * has_mark + write_list(rows, indent, ascii_) + b"\n" * has_mark
    found = find_list_starts(cut(data, block), range(len(data)), len(data))
    assert found == step_through_list(data)
    assert len(found) == len(rows) - 1
    assert (
        find_list_starts(cut(data, block), [len(data) // 2], len(data))
        == [start for start in found if start.place >= len(data) // 2][:1]
    )


@given(
    st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=12),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([",", "\t"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_rows_of_csv_are_where_the_oracle_finds_them(
    rows: list[list[str]], ends: str, delimiter: str, has_mark: bool, block: int
) -> None:
    data = BOM * has_mark + write_table(rows, ends, delimiter)
    found = find_csv_starts(cut(data, block), range(len(data)), len(data), delimiter)
    assert found == step_through_csv(data, delimiter)
    assert len(found) == (0 if ends == "\r" else len(rows) - 1)


@given(st.text(st.sampled_from('a",\n\r\té'), max_size=60), st.integers(1, 20))
def test_places_of_any_text_are_those_of_the_oracle(text: str, block: int) -> None:
    data = text.encode()
    assert find_csv_starts(cut(data, block), range(len(data)), len(data), ",") == step_through_csv(data, ",")
    listed = b"[" + data.replace(b"a", b"]").replace(b"\t", b"[").replace(b"\r", b"\\")
    assert find_list_starts(cut(listed, block), range(len(listed)), len(listed)) == step_through_list(listed)


@settings(max_examples=200)
@given(
    rows=ROWS,
    indent=st.sampled_from([None, 2]),
    shard_bytes=st.integers(8, 60),
    broken=st.one_of(st.none(), st.tuples(st.integers(0, 400), st.sampled_from(["", ",", '"', "]", "}", "\\", "x"]))),
)
def test_a_list_in_parts_has_the_rows_and_errors_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    indent: int | None,
    shard_bytes: int,
    broken: tuple[int, str] | None,
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    if broken is not None:
        place, character = 1 + broken[0] % len(text), broken[1]
        text = text[:place] + character + text[place + (not character) :]
    path = tmp_path_factory.mktemp("list") / "rows.json"
    in_parts = read(path, "json", text.encode(), shard_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_files, "PARSED_WHOLE_BYTES", 0)
        whole = read(path, "json", text.encode(), 1 << 30)
    assert in_parts[:2] == whole[:2]
    assert whole[2] == 0
    if broken is None:
        assert [row.value for row in in_parts[0]] == rows
        assert [row.line for row in in_parts[0]] == list(range(1, len(rows) + 1))


@settings(max_examples=200)
@given(
    rows=st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1, max_size=12),
    ends=st.sampled_from(["\n", "\r\n", "\n\n"]),
    shard_bytes=st.integers(8, 60),
    broken=st.one_of(st.none(), st.tuples(st.integers(0, 400), st.sampled_from(["", ",", '"', '""', "\n", "\r", "x"]))),
)
def test_csv_in_parts_has_the_rows_rejects_and_errors_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[str]],
    ends: str,
    shard_bytes: int,
    broken: tuple[int, str] | None,
) -> None:
    text = write_table(rows, ends, ",").decode()
    if broken is not None:
        place, character = broken[0] % len(text), broken[1]
        text = text[:place] + character + text[place + (not character) :]
    path = tmp_path_factory.mktemp("table") / "rows.csv"
    in_parts = read(path, "csv", text.encode(), shard_bytes)
    assert in_parts[:2] == read(path, "csv", text.encode(), 1 << 30)[:2]


def test_both_kinds_are_divided_in_parts_of_about_the_wanted_size(tmp_path: Path) -> None:
    rows = [{"prompt": f'say "{number}",\n[', "completion": "yes \\"} for number in range(1000)]
    table = [[row["prompt"], row["completion"]] for row in rows]
    for kind, data in (("json", write_list(rows, None, True)), ("csv", write_table(table, "\r\n", ","))):
        found, problem, num_spans = read(tmp_path / f"rows.{kind}", kind, data, 4000)
        assert problem == ""
        assert num_spans == -(-len(data) // 4000)
        assert [row.line for row in found] == list(range(1, 1001))
    assert [row.value for row in found] == [{"one": prompt, "two": answer} for prompt, answer in table]


def test_rejects_and_errors_of_a_part_are_named_by_their_place_in_the_file(tmp_path: Path) -> None:
    lines = ["a,b", *['"x\ny",2'] * 100, "1,2,3", *["1,2"] * 100]
    found, _, num_spans = read(tmp_path / "rows.csv", "csv", "\n".join(lines).encode(), 100)
    assert num_spans > 10
    (reject,) = [row for row in found if row.problem]
    assert reject.line == 101
    assert "3 values under a header of 2, at line 202 of the file" in str(reject.problem)
    lines[150] = '"open'
    _, problem, _ = read(tmp_path / "rows.csv", "csv", "\n".join(lines).encode(), 100)
    assert "broken CSV in the row that begins on line 251" in problem
    data = b"[" + b",\n".join([b'{"a": "\xc3\xa9"}'] * 100 + [b'{"a": nope}'] + [b"1"] * 100) + b"]"
    _, problem, num_spans = read(tmp_path / "rows.json", "json", data, 100)
    assert num_spans > 10
    assert "broken JSON on line 101, column 7" in problem


def test_bytes_that_are_no_text_are_named_by_their_place_in_the_file(tmp_path: Path) -> None:
    for kind, row, front in (("csv", b"1,2\n", b"a,b\n"), ("json", b'"ab",\n', b"[")):
        data = front + row * 100 + row.replace(b"b", b"\xff").replace(b"2", b"\xff") + row * 100 + b"1]"
        place = data.index(b"\xff")
        _, problem, _ = read(tmp_path / f"rows.{kind}", kind, data, 100)
        line = 102 if kind == "csv" else 101
        assert f"byte {place + 1} (offset {place}) is 0xFF, on line {line}:" in problem
