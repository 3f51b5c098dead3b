"""Reads text files as UTF-8, with or without a byte order mark; any other encoding is an error that names the byte."""

from collections.abc import Iterator
from pathlib import Path

from tasks.ingestion.errors import DataError

UTF8_BOM = b"\xef\xbb\xbf"
# UTF-32 first: its little-endian mark begins with UTF-16's.
OTHER_BOMS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def check_start(path: Path, head: bytes) -> None:
    """Refuse the byte order marks of other encodings, and the zero bytes of UTF-16 without one."""
    for mark, encoding in OTHER_BOMS.items():
        if head.startswith(mark):
            raise DataError(
                f"{path}: not UTF-8: byte 1 (offset 0) is 0x{head[0]:02X}, which begins {encoding}: save it as UTF-8, "
                f"such as by iconv -f {encoding} -t UTF-8 FILE > NEW"
            )
    if b"\0" in head[:64]:
        offset = head.index(b"\0")
        raise DataError(
            f"{path}: not UTF-8: byte {offset + 1} (offset {offset}) is 0x00: save it as UTF-8 (is it UTF-16?)"
        )


def decode(path: Path, data: bytes, offset: int, line: int) -> str:
    """Decode UTF-8; name the byte, its offset in the file and its line when that is not possible."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        place = offset + error.start
        raise DataError(
            f"{path}: not UTF-8: byte {place + 1} (offset {place}) is 0x{data[error.start]:02X}, on line {line}: "
            "save the file as UTF-8, by iconv -f ENCODING -t UTF-8 with the encoding that it has, such as WINDOWS-1252 "
            "(western Europe), GB18030 (Chinese) or SHIFT_JIS (Japanese), and look at a few lines: with a wrong "
            "ENCODING iconv may succeed and leave other letters"
        ) from None


def read_text(path: Path) -> str:
    """Read a whole UTF-8 file, without its byte order mark."""
    data = path.read_bytes()
    check_start(path, data[:64])
    start = len(UTF8_BOM) if data.startswith(UTF8_BOM) else 0
    return decode(path, data[start:], start, 1)


def read_text_lines(path: Path) -> Iterator[str]:
    """Read the lines of a UTF-8 file with their ends, whichever these are, without a byte order mark."""
    with path.open("rb") as handle:
        check_start(path, handle.read(64))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        offset = 0
        with path.open("rb") as handle:
            for line, data in enumerate(handle, start=1):
                decode(path, data, offset, line)
                offset += len(data)
        raise
