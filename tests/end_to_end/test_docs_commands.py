"""Every command of README and docs is typed as it is printed, page after page, in one copy of the repository.

What is not run here is in `tests/docs/elsewhere.py`, with the test that runs it. The pages share their runs: a command
that stands on several pages is run once.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.docs.commands import ROOT, Block, find_blocks
from tests.docs.elsewhere import ELSEWHERE
from tests.end_to_end.service import free_port

pytestmark = pytest.mark.slow

_SECONDS = 1500
_PAGES = (
    "README.md",
    "docs/tutorials/own-data.md",
    "docs/planning.md",
    "docs/data.md",
    "docs/registry.md",
    "docs/tutorials/llamafactory.md",
)
"""In an order in which each finds what those before it left."""
_SERVERS = (".venv/bin/mlflow ui",)
"""Commands that stay: they are started, asked for their page, and ended."""
_TYPED_IN = "What does the quamrin eat?\n"
_QUESTIONS = [
    {"instruction": f"Name number {number}.", "input": "", "output": f"It is {number}."} for number in range(60)
]
_TALK = [
    {"messages": [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"{n + 1}."}]}
    for n in range(20)
]


@dataclass
class Reader:
    """Somebody who does what the pages say."""

    folder: Path
    environment: dict[str, str]
    said: dict[str, str] = field(default_factory=dict)
    """The output of each command, by its text."""

    def type(self, command: str) -> str:
        """Run a command as it is printed, once, and return what it printed."""
        if command not in self.said:
            self._bring(command)
            start = self._open if command.startswith(_SERVERS) else self._run
            self.said[command] = start(command)
            if command.startswith("cp deploy/configs/"):  # "set data.source and model.base_model in it"
                self.write(*(block for block in find_blocks(_page("docs/tutorials/own-data.md")) if block.title))
        return self.said[command]

    def write(self, *blocks: Block) -> None:
        """Write the files that blocks with a title are."""
        for block in blocks:
            file = self.folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")

    def _bring(self, command: str) -> None:
        """Put what a page takes for granted: a reader's own rows, and an adapter trained elsewhere."""
        if not (self.folder / "my.jsonl").exists():
            shutil.copy(ROOT / "deploy/demo/data/train.jsonl", self.folder / "my.jsonl")
        if "merge" in command and not (self.folder / "saves").exists():
            _save_adapter(self.folder / "saves/mine/lora/sft")

    def _run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            input=_TYPED_IN,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def _open(self, command: str) -> str:
        port = free_port()
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + _SECONDS
            while time.monotonic() < end:
                assert server.poll() is None, f"{command} ended"
                try:
                    page = httpx.get(f"http://127.0.0.1:{port}", timeout=30)
                except httpx.TransportError:
                    time.sleep(0.5)
                    continue
                assert page.is_success
                return page.text
            raise TimeoutError(command)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _page(name: str) -> Path:
    return ROOT / name


def _save_adapter(folder: Path) -> None:
    """Save a LoRA adapter of the demo's base model and its tokenizer, as other trainers leave them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tasks.tokenization.templates import prepare_tokenizer

    base = AutoModelForCausalLM.from_pretrained(ROOT / "deploy/demo/base_model", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(str(folder))
    prepare_tokenizer(ROOT / "deploy/demo/base_model", None).tokenizer.save_pretrained(str(folder))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """A copy of the repository by links, with an environment in .venv and databases of its own."""
    folder = tmp_path_factory.mktemp("clone")
    for entry in ROOT.iterdir():
        if entry.name not in (".venv", ".sft", ".git", "build", "my.yaml", "my.jsonl", "data", "saves"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv" / ".installed").touch()  # make has nothing to install
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    return Reader(folder, {**kept, "PYTHONPATH": str(ROOT), "NPROC_PER_NODE": "1", "COLUMNS": "80"})


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
