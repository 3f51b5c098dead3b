"""Every command of README and docs is typed as it is printed, page after page, in one copy of the repository.

What is not run here is in `tests/docs/elsewhere.py`, with the test that runs it. The pages share their runs: a command
that stands on several pages is run once.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.commands import ROOT, Block, find_blocks
from tests.docs.elsewhere import ELSEWHERE
from tests.end_to_end.reader import Reader

pytestmark = pytest.mark.slow

_PAGES = (
    "README.md",
    "docs/tutorials/own-data.md",
    "docs/planning.md",
    "docs/data.md",
    "docs/registry.md",
    "docs/tutorials/llamafactory.md",
    "docs/preferences.md",
)
"""In an order in which each finds what those before it left."""
_QUESTIONS = [
    {"instruction": f"Name number {number}.", "input": "", "output": f"It is {number}."} for number in range(60)
]
_TALK = [
    {"messages": [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"{n + 1}."}]}
    for n in range(20)
]


def _page(name: str) -> Path:
    return ROOT / name


def _shape(text: str) -> set[str]:
    """Return the lines of a text without what differs from run to run: times, figures and borders' widths."""
    lines = (re.sub(r"[+-]?\d[\d.,:]*(e-?\d+)?", "#", line) for line in text.splitlines())
    return {" ".join(line.split()) for line in lines} - {""}


def _list_steps() -> Iterator[tuple[Block, str]]:
    for page in _PAGES:
        for block in find_blocks(_page(page)):
            for command in block.commands if block.language == "sh" else ():
                if command not in ELSEWHERE:
                    yield block, command


_STEPS = [pytest.param(block, command, id=f"{block}-{command[:60]}") for block, command in _list_steps()]


def test_every_page_with_commands_is_read_here() -> None:
    pages = {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}
    typed = {
        page
        for page in pages
        for block in find_blocks(page)
        if set(block.commands) - set(ELSEWHERE) and block.language == "sh"
    }
    assert typed == {_page(name) for name in _PAGES}


@pytest.mark.parametrize(("block", "command"), _STEPS)
def test_a_command_does_what_its_page_says(reader: Reader, block: Block, command: str) -> None:
    import json

    reader.write(*(other for other in find_blocks(block.page) if other.title))
    for name, rows in (("identity", _QUESTIONS), ("support", _TALK)):
        (reader.folder / "data").mkdir(exist_ok=True)
        (reader.folder / "data" / f"{name}.json").write_text(json.dumps(rows))
    reader.type(command)


@pytest.mark.parametrize("page", _PAGES)
def test_what_a_page_shows_of_the_output_is_in_it(reader: Reader, page: str) -> None:
    blocks = find_blocks(_page(page))
    said = "\n".join(
        reader.said.get(command, "") for block in blocks if block.language == "sh" for command in block.commands
    )
    shown = {line for block in blocks if block.language == "text" for line in _shape(block.text)}
    assert not shown - _shape(said)


def test_the_downloaded_model_loads_with_transformers(reader: Reader) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = reader.folder / "champion" / "artifacts" / "model"
    assert AutoModelForCausalLM.from_pretrained(folder).config.architectures == ["Qwen3ForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )


def test_a_champion_that_was_overtaken_and_rolled_back_is_told(reader: Reader) -> None:
    second = reader.said[".venv/bin/sft run my.yaml --set training.num_epochs=2"]
    assert "mine version 2: promoted" in second
    back = reader.said['.venv/bin/sft rollback mine --reason "the first one was shorter"']
    assert "champion back to version 1 from version 2" in back
