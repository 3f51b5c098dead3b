"""What README and docs tell people to type: the blocks of code in them, and the commands in these."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md")
_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")
_BEGINNINGS = (
    "make ",
    "sft ",
    ".venv/bin/",
    "python ",
    "pytest",
    "prefect ",
    "mlflow ",
    "PATH=",
    "SFT_",
    "MLFLOW_",
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    language: str
    title: str
    """Name of the file that it is; empty for none."""
    text: str

    @property
    def commands(self) -> list[str]:
        """Each command of a block of `sh`, without its comment."""
        lines = (re.sub(r"\s+#\s.*", "", line).strip() for line in self.text.splitlines())
        return [line for line in lines if line]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def find_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for found in _FENCE.finditer(text):
        language, _, rest = found["info"].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        line = text.count("\n", 0, found.start()) + 1
        blocks.append(Block(page, line, language, title[1] if title else "", found["text"]))
    return blocks


def find_inline(page: Path) -> list[str]:
    """Return the commands that stand in sentences and tables of a page."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found = (" ".join(words.split()) for words in _INLINE.findall(text))
    return [words for words in found if words.startswith(_BEGINNINGS) and " " in words]
