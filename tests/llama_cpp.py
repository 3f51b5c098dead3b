"""llama.cpp itself, which reads what was exported: node-llama-cpp's prebuilt one, in .llama."""

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ROOT = Path(__file__).parent.parent
_INSTALLED = _ROOT / ".llama" / ".installed"
_PROGRAM = Path(__file__).parent / "tasks" / "exporting" / "llama_cpp" / "answer.mjs"


@dataclass(frozen=True)
class Question:
    """What a GGUF file is asked."""

    model: str
    """Its path."""
    texts: Sequence[str] = ()
    """To tokenize; names of control tokens stand for these."""
    probabilities: Sequence[Sequence[int]] = ()
    """Ids of texts after each of whose tokens the probabilities of the next are wanted."""
    prompts: Sequence[Sequence[int]] = ()
    """To go on with, greedily."""
    most: int = field(default=24, kw_only=True)
    """Tokens of an answer."""


@dataclass(frozen=True)
class Reading:
    """What llama.cpp made of it."""

    tokens: list[list[int]]
    probabilities: list[Tensor]
    """[T, V] each, fp32."""
    answers: list[list[int]]
    """Without the token that ends them."""
    have_ended: list[bool]
    """Whether one did, before the tokens were up."""
    ends: list[int]
    """All ids that end a generation."""


def why_missing() -> str:
    """Return why llama.cpp cannot be asked here; empty where it can."""
    if shutil.which("node") is None:
        return "llama.cpp is asked by Node.js, which is not here"
    return "" if _INSTALLED.is_file() else "llama.cpp is not in .llama: `make test-llama` brings it"


def ask_llama_cpp(questions: Sequence[Question], folder: Path, *, num_tokens: int) -> list[Reading]:
    """Ask files in one process, each in turn.

    Args:
        questions: one a file.
        folder: for the job and the answers.
        num_tokens: of the vocabulary.
    """
    job = {
        "packages": str(_INSTALLED.parent / "node_modules"),
        "output": str(folder / "answers.json"),
        "num_tokens": num_tokens,
        "files": [asdict(question) for question in questions],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = ["node", str(_PROGRAM), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    return [
        Reading(
            values["tokens"],
            [_decode(text, num_tokens) for text in values["probabilities"]],
            [answer["tokens"] for answer in values["answers"]],
            [answer["ended"] for answer in values["answers"]],
            values["ends"],
        )
        for values in answers
    ]


def _decode(text: str, num_tokens: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).reshape(-1, num_tokens).copy())
