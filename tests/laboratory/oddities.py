"""Inputs that people have and nobody plans for: encodings, odd folders, holes, LLaMA-Factory's files, settings."""

import gzip
import os
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import yaml

from tests.laboratory.junk import draw_value, dump, mutate, spoil
from tests.laboratory.recipes import draw_llamafactory_method, draw_other_program

ROOT = Path(__file__).resolve().parents[2]
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "gb18030", "cp1252", "utf-7")
_SPARSE_BYTES = 256 << 20
_BOMB_BYTES = 64 << 20
_NAMES = (b"rows.jsonl", b"a b.jsonl", b".hidden.jsonl", b"\xff\xfe.jsonl", b"new\nline.jsonl", "é✓.jsonl".encode())
_LLAMAFACTORY: dict[str, Any] = {
    "model_name_or_path": "models/small",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "dataset": "identity,talk",
    "dataset_dir": "data",
    "template": "qwen",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "output_dir": "saves/x",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1.0e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "val_size": 0.1,
    "quantization_bit": 4,
    "deepspeed": "ds_z3.json",
    "export_dir": "out",
    "adapter_name_or_path": "saves/a",
}
_RARE = ("quantization_bit", "deepspeed", "export_dir", "adapter_name_or_path")
_KEYS = (
    *("name", "seed", "model.base_model", "data.source", "data.mixture", "data.columns", "training.rank"),
    *("training.learning_rate", "training.strategy", "evaluation.probes", "registry.gate", "registry", "training"),
    *("", ".", "a.b.c", "training.", ".rank", "training.rank.more", "TRAINING.RANK", "data.mixture.0.source"),
)


def write_encoded(folder: Path, rows: list[Any], draw: Random) -> tuple[str, int | None]:
    """Write rows in another encoding, or with other line ends; return the file and how many rows it has, if known."""
    encoding = draw.choice(_ENCODINGS)
    end = draw.choice(("\n", "\r\n", "\r", "\n\n"))
    text = end.join(dump(row).decode() for row in rows) + draw.choice(("", end, "\x1a", "\x00"))
    name = draw.choice(("rows.jsonl", "rows.json", "rows.csv", "rows.JSONL", "rows.ndjson"))
    (folder / name).write_bytes(text.encode(encoding, "replace"))
    known = encoding == "utf-8-sig" and end in ("\n", "\r\n") and name == "rows.jsonl" and text[-1] not in "\x1a\x00"
    return str(folder / name), len(rows) if known else None


def write_stream(folder: Path, rows: list[Any], draw: Random) -> tuple[str, int | None]:
    """Write compressed lines, whole or spoiled; return the file and how many rows it has, if known.

    What gzip notices by its checksum is refused: then so many rows come out as went in, or none.
    """
    lines = [dump(row) + b"\n" for row in rows]
    cuts = sorted(draw.randrange(len(lines) + 1) for _ in range(draw.choice((0, 0, 1, 3))))
    members = [b"".join(lines[start:end]) for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True)]
    name, pack = draw.choice((("rows.jsonl.gz", gzip.compress), ("rows.jsonl.zst", _pack_zstd)))
    packed = [pack(member) for member in members]
    content, how = b"".join(packed), draw.randrange(6)
    known: int | None = len(rows)
    if how == 0:
        content = spoil(content, draw)
        known = None
    elif how == 1:  # within a member: at its end, nobody would know that more was to come
        content = content[: -draw.randrange(1, min(len(packed[-1]), 9))]
        known = len(rows) if name.endswith(".gz") else None
    elif how == 2:
        content += draw.choice((b"\0" * 700, b"more", b'{"prompt": "a", "completion": "b"}\n'))
        known = None
    elif how == 3:
        name = draw.choice(("rows.jsonl", "rows.json.gz", "rows.jsonl.zst", "rows.jsonl.gz", "rows.jsonl.gz.zst"))
        known = None
    (folder / name).write_bytes(content)
    return str(folder / name), known


def _pack_zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


def write_holes(folder: Path, rows: list[Any], draw: Random) -> str:
    """Write 256 MiB of which hardly anything is on the disk, something that unpacks to far more, or a long row."""
    lines = b"".join(dump(row) + b"\n" for row in rows)
    kind = draw.randrange(4)
    if kind == 0:
        place = folder / draw.choice(("rows.jsonl", "rows.parquet", "rows.csv", "rows.json", "rows.arrow"))
        place.write_bytes(lines)
        os.truncate(place, _SPARSE_BYTES)
    elif kind == 1:
        place = folder / draw.choice(("rows.jsonl.gz", "rows.jsonl", "rows.json.gz", "rows.parquet", "rows.jsonl.gz"))
        place.write_bytes(gzip.compress(lines + b" " * _BOMB_BYTES))
    elif kind == 2:
        place = folder / draw.choice(("rows.zip", "rows.jsonl", "rows.jsonl.zip"))
        with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("../rows.jsonl", lines + b" " * _BOMB_BYTES)
    else:
        place = folder / "rows.jsonl"
        place.write_bytes(lines + b'{"prompt": "' + b"a" * (32 << 20) + b'", "completion": "b"}\n')
    return str(place)


def write_tree(folder: Path, rows: list[Any], draw: Random) -> str:
    """Write a folder of folders: loops, odd names, other files, files that may not be read, and some rows."""
    root = folder / "tree"
    root.mkdir()
    place = root
    for _ in range(draw.choice((1, 3, 40))):
        place = place / draw.choice(("a", "b c", ".git", "..data", "x" * 60))
        place.mkdir(exist_ok=True)
        if draw.random() < 0.3:
            (place / "loop").symlink_to(draw.choice((root, place, Path(".."))), target_is_directory=True)
        if draw.random() < 0.5:
            name = os.fsdecode(draw.choice(_NAMES))
            (place / name).write_bytes(b"".join(dump(row) + b"\n" for row in rows))
        if draw.random() < 0.2:
            (place / "rows.parquet").write_bytes(b"PAR1" + draw.randbytes(20) + b"PAR1")
        if draw.random() < 0.2:
            (place / "README.md").write_text("# nothing")
        if draw.random() < 0.1:
            os.mkfifo(place / f"pipe{draw.randrange(9)}.jsonl")
        if draw.random() < 0.1:
            (place / "locked.jsonl").write_bytes(b"{}")
            (place / "locked.jsonl").chmod(0)
    return str(root)


def write_numbers(folder: Path, rows: list[Any], draw: Random) -> tuple[str, int]:
    """Write rows whose numbers no machine has, as JSON spells them."""
    numbers = ("1" * 5000, "-" + "9" * 4301, "1e400", "-1e-400", "0." + "1" * 9000, "1E+99999999", "-0", "1" + "0" * 30)
    texts = [dump(row).decode() for row in rows]
    for place in range(len(texts)):
        if draw.random() < 0.5:
            number = draw.choice(numbers)
            shape = draw.choice(
                ('{"prompt": "a", "completion": %s}', '{"n": %s, "prompt": "a", "completion": "b"}', "%s")
            )
            texts[place] = shape % number
    (folder / "rows.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(folder / "rows.jsonl"), len(texts)


def draw_foreign(folder: Path, draw: Random) -> tuple[Path, tuple[str, ...]]:
    """Write a config of another program's, changed at a few places, and return it with key=value overrides."""
    values: Any = {
        key: value for key, value in _LLAMAFACTORY.items() if draw.random() < (0.1 if key in _RARE else 0.95)
    }
    (folder / "data").mkdir()
    index = {name: {"file_name": f"{name}.json"} for name in ("identity", "talk")}
    (folder / "data" / "dataset_info.json").write_bytes(dump(mutate(index, draw) if draw.random() < 0.2 else index))
    for name in index:
        (folder / "data" / f"{name}.json").write_bytes(dump([{"instruction": "a", "output": "b"}]))
    if draw.random() < 0.4:
        values |= draw_llamafactory_method(draw)
    if draw.random() < 0.5:
        values = draw_other_program(draw)
    for _ in range(draw.choice((0, 1, 2, 4))):
        values = mutate(values, draw)
    try:
        content = yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        content = dump(values)
    path = folder / "their.yaml"
    path.write_bytes(spoil(content, draw) if draw.random() < 0.2 else content)
    return path, draw_settings(draw, tuple(values) if isinstance(values, dict) and values else tuple(_LLAMAFACTORY))


def draw_settings(draw: Random, keys: tuple[str, ...] = _KEYS) -> tuple[str, ...]:
    """Return key=value settings as people type them, most of them wrong."""
    settings = []
    for _ in range(draw.choice((0, 0, 1, 2, 3))):
        value = draw_value(draw)
        text = draw.choice(
            (str(value)[:5000], dump(value)[:5000].decode(), "[1, 2", "{a: b", "*x", "!!python/name:os.x")
        )
        settings.append(draw.choice(keys) + draw.choice(("=", "=", "=", "", "==", ": ")) + text)
    return tuple(settings)


def spoil_tokenizer(model: Path, draw: Random) -> None:
    """Give a model's folder a tokenizer that nobody has trained."""
    odd: tuple[tuple[str, Any], ...] = (
        ("tokenizer_config.json", {"tokenizer_class": draw.choice(("NoSuch", "PreTrainedTokenizerFast", 3, None))}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}),
        (
            "tokenizer_config.json",
            {"chat_template": draw.choice(([{"name": "default", "template": "{{ x"}], {}, 3, ""))},
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {draw.choice(("-1", "x", "999999999")): {"content": "a"}}}),
        ("tokenizer_config.json", {"model_max_length": draw.choice((-1, 0, 1e30, "x")), "eos_token": draw_value(draw)}),
        ("special_tokens_map.json", draw_value(draw)),
        ("added_tokens.json", {"<x>": draw.choice((-5, 10**12, "a", 0))}),
        ("generation_config.json", {"eos_token_id": draw.choice((-1, 10**9, "x", [1, "a"], None, {}))}),
        ("tokenizer.json", {"version": "1.0", "model": {"type": draw.choice(("BPE", "WordLevel", "X")), "vocab": {}}}),
        ("tokenizer.model", None),
        ("vocab.json", {"a": 0, "b": 0}),
    )
    name, value = draw.choice(odd)
    (model / name).write_bytes(draw.randbytes(50) if value is None else dump(value))
    if draw.random() < 0.3:
        (model / "tokenizer.json").unlink(missing_ok=True)
