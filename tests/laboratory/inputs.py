"""Inputs that a seed draws: configs, datasets, model folders and templates, most of them wrong somewhere."""

import csv
import io
import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import yaml

from tests.laboratory.junk import draw_value, dump, mutate, spoil
from tests.laboratory.oddities import (
    spoil_tokenizer,
    write_encoded,
    write_holes,
    write_numbers,
    write_stream,
    write_tree,
)
from tests.laboratory.recipes import draw_recipe

ROOT = Path(__file__).resolve().parents[2]
DEMO_MODEL = ROOT / "deploy" / "demo" / "base_model"
_BOMB = b"a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 9)
)


@dataclass(frozen=True)
class Dataset:
    """A source of rows."""

    source: str
    num_rows: int | None
    """None where nobody can tell."""


def draw_config(folder: Path, draw: Random) -> Path:
    """Write a config that was changed at a few places."""
    values = draw_recipe(draw)
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        values = mutate(values, draw)
    try:
        content = yaml.safe_dump(values, allow_unicode=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        content = dump(values) if draw.random() < 0.9 else b"\x00"
    extras = (
        b"",
        b"",
        b"",
        _BOMB,
        b"x: &x [*x]\n",
        b"!!python/object/apply:os.system [ls]\n",
        b"? {a: 1}\n: b\n",
        b"\t",
        b"---\n",
    )
    content = draw.choice(extras) + content
    if draw.random() < 0.3:
        content = spoil(content, draw)
    path = folder / "config.yaml"
    path.write_bytes(content)
    return path


def _draw_row(draw: Random) -> dict[str, Any]:
    number = draw.randrange(10_000)
    ask, say = f"What is {number} and {number}?", f"It is {2 * number}, and not {number}."
    turns = [("user", ask), ("assistant", say), ("user", "Why?"), ("assistant", f"Because of {number}.")]
    rows: tuple[dict[str, Any], ...] = (
        {"prompt": ask, "completion": say},
        {"instruction": ask, "input": "", "output": say},
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": text} for r, text in turns]},
    )
    return rows[draw.randrange(len(rows))]


def draw_rows(draw: Random) -> list[Any]:
    """Return rows of one format, some of them changed."""
    like = _draw_row(draw)
    rows = [row for row in (_draw_row(draw) for _ in range(120)) if row.keys() == like.keys()][: draw.randrange(2, 20)]
    share = draw.choice((0.0, 0.2, 0.6))
    changed: list[Any] = [mutate(row, draw) if draw.random() < share else row for row in (like, *rows)]
    draw.shuffle(changed)
    return changed


def draw_dataset(folder: Path, draw: Random) -> Dataset:
    """Write a dataset of any kind, or something that is none."""
    if draw.random() < 0.08:
        return Dataset(_write_oddity(folder, draw), None)
    if draw.random() < 0.2:
        return _draw_odd_rows(folder, draw)
    write = draw.choice(
        (_write_jsonl, _write_jsonl, _write_json, _write_csv, _write_parquet, _write_arrow, _write_index)
    )
    dataset = write(folder, draw_rows(draw), draw)
    if draw.random() < 0.5:
        file = Path(dataset.source.partition("#")[0])
        file.write_bytes(spoil(file.read_bytes(), draw))
        return Dataset(dataset.source, None)
    return dataset


def _draw_odd_rows(folder: Path, draw: Random) -> Dataset:
    rows = draw_rows(draw)
    kind = draw.randrange(12)
    if kind == 0:
        return Dataset(write_holes(folder, rows, draw), None)
    if kind < 3:
        return Dataset(write_tree(folder, rows, draw), None)
    write = write_numbers if kind < 5 else write_stream if kind < 8 else write_encoded
    return Dataset(*write(folder, rows, draw))


def _write_oddity(folder: Path, draw: Random) -> str:
    place = folder / draw.choice(("rows.jsonl", "rows.parquet", "rows.arrow", "rows"))
    kind = draw.randrange(8)
    if kind == 0:
        os.mkfifo(place)
    elif kind == 1:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
    elif kind == 2:
        place.symlink_to(draw.choice(("/dev/zero", "/dev/random", "/dev/null", place.name, "nowhere")))
    elif kind == 3:
        place.mkdir()
        (place / "loop").symlink_to(place)
    elif kind == 4:
        place.write_bytes(draw.randbytes(draw.randrange(300)))
    elif kind == 5:
        return str(draw_value(draw))[:300].encode("utf-8", "replace").decode()
    elif kind == 6:
        place.write_bytes(b"")
    return str(place)


def _write_jsonl(folder: Path, rows: list[Any], draw: Random) -> Dataset:
    (folder / "rows.jsonl").write_bytes(b"".join(dump(row) + b"\n" for row in rows))
    return Dataset(str(folder / "rows.jsonl"), len(rows))


def _write_json(folder: Path, rows: list[Any], draw: Random) -> Dataset:
    (folder / "rows.json").write_bytes(dump(rows))
    return Dataset(str(folder / "rows.json"), len(rows))


def _write_csv(folder: Path, rows: list[Any], draw: Random) -> Dataset:
    name = draw.choice(("rows.csv", "rows.tsv"))
    names = list(rows[0]) if isinstance(rows[0], dict) else ["prompt", "completion"]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if name.endswith("tsv") else ",")
    writer.writerow(names)
    for row in rows:
        writer.writerow([str(value)[:4000] for value in (row.values() if isinstance(row, dict) else [row])])
    (folder / name).write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    return Dataset(str(folder / name), None)  # a cell may hold quotes and line ends


def _to_table(rows: list[Any], draw: Random) -> Any:
    kept = [row for row in rows if isinstance(row, dict)] or [{"prompt": "a", "completion": "b"}]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(str(key) for row in kept for key in row):
        values = [row.get(name) for row in kept]
        try:
            columns[name.encode("utf-8", "replace").decode()] = pa.array(values)
        except (pa.ArrowException, OverflowError, ValueError, TypeError, RecursionError):
            texts = [str(value)[:1000].encode("utf-8", "replace") for value in values]
            columns[name.encode("utf-8", "replace").decode()] = pa.array(texts).cast(
                draw.choice((pa.binary(), pa.string()))
            )
    size = len(kept)
    odd: tuple[Callable[[], Any], ...] = (
        lambda: pa.array([2**62] * size).cast(pa.timestamp("us")),
        lambda: pa.array([[(1, "a")]] * size, type=pa.map_(pa.int64(), pa.string())),
        lambda: pa.array([[("a", 1), ("a", 2)]] * size, type=pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(["x"] * size).dictionary_encode(),
        lambda: pa.nulls(size),
        lambda: pa.array([b"\xff\xfe"] * size, type=pa.binary()),
        lambda: pa.array([1.5] * size, type=pa.float16() if hasattr(pa, "float16") else pa.float32()),
    )
    if draw.random() < 0.4:
        columns["odd"] = draw.choice(odd[:-1])()
    return pa.table(columns)


def _write_parquet(folder: Path, rows: list[Any], draw: Random) -> Dataset:
    table = _to_table(rows, draw)
    try:
        pq.write_table(table, folder / "rows.parquet", row_group_size=draw.choice((3, 1000)))
    except pa.ArrowNotImplementedError:  # an object without keys has no columns
        return _write_arrow(folder, rows, draw)
    return Dataset(str(folder / "rows.parquet"), table.num_rows)


def _write_arrow(folder: Path, rows: list[Any], draw: Random) -> Dataset:
    table = _to_table(rows, draw)
    open_writer = draw.choice((pa.ipc.new_file, pa.ipc.new_stream))
    try:
        with open_writer(str(folder / "rows.arrow"), table.schema) as writer:
            writer.write_table(table)
    except pa.ArrowInvalid:  # it is nested more deeply than Arrow writes
        return _write_jsonl(folder, rows, draw)
    return Dataset(str(folder / "rows.arrow"), table.num_rows)


def _write_index(folder: Path, rows: list[Any], draw: Random) -> Dataset:
    (folder / "rows.json").write_bytes(dump(rows))
    entry = {
        "file_name": "rows.json",
        "formatting": draw.choice(("alpaca", "sharegpt")),
        "columns": {"prompt": "prompt"},
    }
    index: Any = {"mine": entry, "other": {"hf_hub_url": "a/b"}}
    for _ in range(draw.choice((0, 1, 2))):
        index = mutate(index, draw)
    (folder / "dataset_info.json").write_bytes(dump(index))
    return Dataset(f"{folder / 'dataset_info.json'}#mine", None)


def draw_model(tiny: Path, folder: Path, draw: Random) -> Path:
    """Copy a small model, and change one or two of its files."""
    model = folder / "model"
    shutil.copytree(tiny, model)
    for _ in range(draw.choice((1, 1, 2))):
        file = draw.choice(sorted(model.iterdir()))
        how = draw.random()
        if how < 0.1:
            file.unlink()
        elif how < 0.4 or file.suffix != ".json":
            file.write_bytes(spoil(file.read_bytes(), draw))
        else:
            values: Any = None
            with suppress(ValueError):  # it was spoiled before
                values = json.loads(file.read_bytes())
            file.write_bytes(dump(mutate(values, draw)))
        if not any(model.iterdir()):
            break
    if draw.random() < 0.2:
        names = {f"w{n}": draw.choice(("model.safetensors", "w.bin", "../x.safetensors", 3)) for n in range(2)}
        (model / "model.safetensors.index.json").write_bytes(dump(mutate({"weight_map": names}, draw)))
    if draw.random() < 0.2:
        spoil_tokenizer(model, draw)
    if draw.random() < 0.1:
        (model / draw.choice(("adapter_config.json", "chat_template.jinja"))).write_bytes(dump(draw_value(draw)))
    return model


_PARTS = (
    *("{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% endif %}", "{% else %}"),
    *(
        "<|im_start|>",
        "<|im_end|>",
        "\n",
        "{{ m.role }}",
        "{{ m.content }}",
        "{{ m['content'] | trim }}",
        "{{- '\\n' -}}",
    ),
    *("{{ eos_token }}", "{{ bos_token }}", "{{ tools }}", "{% set x = namespace(n=0) %}", "{{ m.content | upper }}"),
    *("{{ raise_exception('no') }}", "{{ messages | tojson }}", "{{ messages[0].nothing.more }}", "{{ 1 / 0 }}"),
    *(
        "{% for a in range(99999) %}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% include 'x' %}",
        "{{ self.__class__ }}",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ lipsum(9999) }}",
        "{% break %}",
    ),
    *(
        "{{ '%999999d' % 1 }}",
        "{{ 'x'.center(10 ** 8) }}",
        "{% set t = messages | string %}{{ t ~ t }}",
        "assistant\n",
        "user\n",
    ),
    *(
        "{% if loop.last %}",
        "{% if m.role == 'assistant' %}",
        "{{ m.content[:3] }}",
        "{{ strftime_now('%Y') }}",
        "{{ {} | dictsort }}",
    ),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def draw_template(folder: Path, draw: Random) -> Path:
    """Write a chat template: a usual one changed somewhere, or parts of templates in any order."""
    own = (ROOT / "tasks" / "tokenization" / "chatml.jinja").read_text(encoding="utf-8")
    text = draw.choice((CHATML, CHATML, own))
    how = draw.random()
    if how < 0.35:
        text = "".join(draw.choice(_PARTS) for _ in range(draw.randrange(12)))
    elif how < 0.7:
        for _ in range(draw.choice((1, 2))):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(_PARTS) + text[at:]
    elif how < 0.8:
        old = draw.choice(("{{ m.content }}", "<|im_end|>", "{{ m.role }}", "{% endfor %}", "messages", "assistant"))
        text = text.replace(old, draw.choice(_PARTS))
    content = text.encode()
    if how >= 0.8:
        content = spoil(content, draw)
    path = folder / "template.jinja"
    path.write_bytes(content)
    return path
