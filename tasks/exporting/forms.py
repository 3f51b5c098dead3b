"""The forms that a version can be exported in: a row each says how it is written, and how it is read for its proof."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tasks.exporting.errors import ExportError

Write = Callable[[Path, Path, str], tuple[str, ...]]
Unfold = Callable[[Path, Path, Path], Path]


@dataclass(frozen=True)
class Form:
    """A form."""

    name: str
    least_agreement: float
    """Part of the greedy tokens that have to be the parent's, near ties apart: our choice."""
    write: Write
    """Given the parent's folder, the export's and a name, writes it and returns notes."""
    unfold: Unfold
    """Given the parent's folder, the export's and a new one, returns a folder that loads with the export's values."""


def _write_gguf(kind: str) -> Write:
    def write(parent: Path, folder: Path, name: str) -> tuple[str, ...]:
        _need("gguf")
        from tasks.exporting.gguf_file import write_gguf
        from tasks.exporting.modelfile import write_modelfile
        from tasks.exporting.stops import read_stops

        file = f"{name}-{kind}.gguf"
        write_gguf(parent, folder / file, kind, name=name)
        text, note = write_modelfile(parent, file, stops=read_stops(parent))
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        return (note,) if note else ()

    return write


def _unfold_gguf(parent: Path, folder: Path, target: Path) -> Path:
    from tasks.exporting.gguf_file import unfold

    (file,) = folder.glob("*.gguf")
    unfold(parent, file, target)
    return target


def _need(package: str, extra: str = "export") -> None:
    """Raise ExportError where an extra is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ExportError(f"this form needs the package {package}: pip install 'sft-pipeline[{extra}]'")


def _write_packed(bits: int) -> Write:
    def write(parent: Path, folder: Path, name: str) -> tuple[str, ...]:
        _need("compressed_tensors", "compressed")
        from tasks.exporting.compressed import write_compressed

        return write_compressed(parent, folder, bits)

    return write


def _unfold_packed(parent: Path, folder: Path, target: Path) -> Path:
    from tasks.exporting.compressed import unfold_compressed

    return unfold_compressed(folder, target)


def _list_gguf() -> dict[str, Form]:
    bits = {"f32": 0.999, "f16": 0.99, "bf16": 0.98, "q8_0": 0.97, "q4_0": 0.8}
    return {
        f"gguf-{kind}": Form(f"gguf-{kind}", least, _write_gguf(kind), _unfold_gguf) for kind, least in bits.items()
    }


def _list_packed() -> dict[str, Form]:
    bits = {"int8": (8, 0.97), "int4": (4, 0.8)}
    return {name: Form(name, least, _write_packed(bits), _unfold_packed) for name, (bits, least) in bits.items()}


FORMS: dict[str, Form] = {**_list_gguf(), **_list_packed()}
"""By name. A further one is a row here."""
