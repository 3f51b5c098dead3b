"""Somebody who types what README and docs print, in one copy of the repository; each command is run once.

The first of each kind is typed at a shell. What follows of the same kind is forked from a process that has done the
imports already.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.docs.commands import ROOT, Block, find_blocks
from tests.end_to_end.service import free_port
from tests.end_to_end.warm import WarmProcess

_SECONDS = 1500
_SERVERS = (".venv/bin/mlflow ui",)
"""Commands that stay: they are started, asked for their page, and ended."""
_TYPED_IN = "What does the quamrin eat?\n"
_SFT = ".venv/bin/sft "
_FOR_A_SHELL = set("|&;<>$`*(){}[]\\\n")
_BARE = ("check", "init", "import")
"""They do without the libraries that the others have imported."""


@dataclass
class Reader:
    """Somebody who does what the pages say."""

    folder: Path
    environment: dict[str, str]
    server: str
    """Prefect's, which spares every command but `make demo` the start of one of its own."""
    said: dict[str, str] = field(default_factory=dict)
    """The output of each command, by its text."""
    kinds: set[str] = field(default_factory=set)
    """The commands of `sft` that were typed at a shell."""
    warm: WarmProcess | None = None

    def close(self) -> None:
        """Leave."""
        if self.warm is not None:
            self.warm.close()

    def type(self, command: str) -> str:
        """Run a command as it is printed, once, and return what it printed."""
        if command not in self.said:
            self._bring(command)
            start = self._open if command.startswith(_SERVERS) else self._run
            self.said[command] = start(command)
            if command.startswith("cp deploy/configs/"):  # "set data.source and model.base_model in it"
                self.write(
                    *(block for block in find_blocks(ROOT / "docs" / "tutorials" / "own-data.md") if block.title)
                )
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
        environment = {**self.environment, "PREFECT_API_URL": self.server}
        kind = command.removeprefix(_SFT).partition(" ")[0] if command.startswith(_SFT) else None
        if kind in self.kinds and kind not in _BARE and not _FOR_A_SHELL & set(command):
            self.warm = self.warm or WarmProcess(self.folder, environment)
            done = self.warm.run(command, typed_in=_TYPED_IN, seconds=_SECONDS)
        else:
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=self.folder,
                env=self.environment if command == "make demo" else environment,
                input=_TYPED_IN,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        if kind is not None:
            self.kinds.add(kind)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def _open(self, command: str) -> str:
        port = free_port()
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command} --port {port} --workers 1"],  # in place of four
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


def make_reader(folder: Path, server: str) -> Reader:
    """A copy of the repository by links, with an environment in .venv and databases of its own."""
    for entry in ROOT.iterdir():
        if entry.name not in (".venv", ".sft", ".git", "build", "my.yaml", "my.jsonl", "data", "saves"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != ".installed":
            (folder / ".venv" / entry.name).symlink_to(entry)
    (folder / ".venv" / ".installed").touch()  # make has nothing to install
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "SFT_"))}
    environment = {**kept, "PYTHONPATH": str(ROOT), "NPROC_PER_NODE": "1", "COLUMNS": "80"}
    return Reader(folder, environment, server)
