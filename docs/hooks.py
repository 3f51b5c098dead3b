"""What the site's builder asks: the README is the first page, and links to files outside docs/ become tooltips.

The site stands alone, without the repository beside it, so that such a link would lead nowhere.
"""

import re
from pathlib import Path
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<!!)\[(?P<words>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the site's first page."""
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    page = re.sub(r"\]\(docs/", "](", re.sub(r"\]\((?!docs/|https?:|#)", "](../", text))
    files.append(File.generated(config, "index.md", content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write a link to a file of the repository as its words, with the file's place as a tooltip."""
    folder = Path(page.file.src_uri).parent.as_posix()

    def point(link: re.Match[str]) -> str:
        target = link["target"]
        place = normpath(f"docs/{folder}/{target}")
        if "://" in target or place.startswith("docs/"):
            return link[0]
        return f'<abbr class="file" title="{place}">{link["words"]}</abbr>'

    return _LINK.sub(point, markdown)
