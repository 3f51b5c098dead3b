"""What README and docs say can be typed, linked to and read: it is there."""

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from flows.cli import app
from tests.docs.commands import PAGES, ROOT, find_blocks, find_inline
from tests.docs.elsewhere import ELSEWHERE, INLINE

_LANGUAGES = {"sh", "text", "yaml", "json", "python", "nginx"}
_INLINE = {command: page for page in PAGES for command in find_inline(page)}
_TYPED = {
    command: block
    for page in PAGES
    for block in find_blocks(page)
    if block.language == "sh"
    for command in block.commands
}
_MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_block_says_what_it_is() -> None:
    blocks = [block for page in PAGES for block in find_blocks(page)]
    assert len(blocks) > 30
    assert not [str(block) for block in blocks if block.language not in _LANGUAGES]


def test_commands_that_another_test_runs_are_on_a_page_and_their_tests_exist() -> None:
    assert not set(ELSEWHERE) - set(_TYPED), "no page has these any more"
    assert not set(INLINE) - set(_INLINE), "no page has these any more"
    for place in {*ELSEWHERE.values(), *INLINE.values()}:
        file, _, name = place.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8"), place


def _is_looked_up(command: str) -> bool:
    """Tell whether a command in a sentence is one of the Makefile's or of sft's, with options that there are."""
    program, name, *rest = [
        word for word in shlex.split(command) if "=" not in word.split("/")[0] or word.startswith("-")
    ]
    if program == "make":
        return re.search(rf"^{name}:", _MAKEFILE, re.MULTILINE) is not None
    if program.removeprefix(".venv/bin/") != "sft":
        return False
    known: Any = typer.main.get_command(app)
    options = {
        option for parameter in known.commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return all(word in options for word in rest if word.startswith("-"))


@pytest.mark.parametrize("command", sorted(_INLINE))
def test_a_command_in_a_sentence_is_one(command: str) -> None:
    assert command in INLINE or command in _TYPED or _is_looked_up(command), _INLINE[command]


def test_each_target_of_make_that_is_named_has_a_program() -> None:
    named = {words.split()[1] for words in {*_INLINE, *_TYPED} if words.startswith("make ")}
    assert {"demo", "test", "docs", "serve", "stop"} <= named
    for target in named:
        recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", _MAKEFILE, re.MULTILINE)
        assert recipe is not None, target
        for module in re.findall(r"python -m ((?:tests|mkdocs)[\w.]*)", recipe[1]):
            assert importlib.util.find_spec(module) is not None, module
        for file in re.findall(r"python (tests/\S+\.py)", recipe[1]):
            assert (ROOT / file).is_file(), file
    assert {"make check", "make test"} <= set((ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines())


def test_each_module_that_is_named_as_a_program_is_one() -> None:
    named = {found for words in _INLINE for found in re.findall(r"python -m ([\w.]+)", words)}
    assert len(named) >= 6
    for module in named:
        found = importlib.util.find_spec(module)
        assert found is not None, module
        assert found.origin is not None, module
        assert '__name__ == "__main__"' in Path(found.origin).read_text(encoding="utf-8"), module
    assert (ROOT / "tests/tasks/families/test_matrix.py").is_file()


def test_each_extra_that_is_named_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {found for words in {*_INLINE, *_TYPED} for found in re.findall(r"sft-pipeline\[([\w,]+)\]", words)}
    assert {"nf4", "flash4", "liger", "deepspeed"} <= named <= set(extras)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_to_a_file_leads_to_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]
