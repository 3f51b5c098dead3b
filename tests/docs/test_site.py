"""The site builds without a warning, and stands alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        "deploy/site/mkdocs.yml",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_every_page_is_there(site: Path) -> None:
    pages = {file.relative_to(ROOT / "docs").with_suffix(".html") for file in (ROOT / "docs").rglob("*.md")}
    assert pages | {Path("index.html")} <= {file.relative_to(site) for file in site.rglob("*.html")}
    assert "<h1" in (site / "index.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere_and_no_link_leaves_the_site(site: Path) -> None:
    for file in set(site.rglob("*.html")) - {site / "404.html"}:  # which is for servers
        text = file.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)=["\']?(https?:[^"\'\s>]+)', text)
        assert not fetched, file
        for target in re.findall(r'<a[^>]+href="(?!https?:)([^"#]+)', text):
            assert (file.parent / target).exists(), f"{file.name}: {target}"
