"""Talking to a model folder, and messages of the commands on the registry."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from flows.chatting import SamplingConfig, answer, open_sessions
from flows.cli import app
from tasks.evaluation.generation import render_questions
from tasks.models import load_model, load_tokenizer

_runner = CliRunner()
_BASE_MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "base_model"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SAMPLING = SamplingConfig(max_new_tokens=8)


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(_BASE_MODEL, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _greedy(folder: Path, text: str) -> str:
    """Continue a rendered conversation with plain transformers."""
    tokenizer: Any = load_tokenizer(folder)
    model: Any = load_model(folder)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(output, skip_special_tokens=True))


def test_one_question_prints_the_answer_and_nothing_else(folder: Path) -> None:
    result = _runner.invoke(app, ["chat", str(folder), "--prompt", "Who are you?", "--max-tokens", "8"])
    assert result.exit_code == 0, result.output
    expected = _greedy(folder, "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n")
    assert result.stdout == f"{expected}\n"


def test_the_conversation_is_kept_and_is_the_prompt_of_the_next_answer(folder: Path) -> None:
    (session,) = open_sessions(str(folder), compare_base=False, system="Be brief.")
    first = "".join(answer(session, "Who?", _SAMPLING))
    second = "".join(answer(session, "And?", _SAMPLING))
    assert [message["content"] for message in session.messages] == ["Be brief.", "Who?", first, "And?", second]
    said = f"system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n{first}<|im_end|>\n"
    assert second == _greedy(folder, f"<|im_start|>{said}<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_reset_forgets_and_the_end_of_input_ends(folder: Path) -> None:
    lines = "Who?\nAnd?\n/reset\nWho?\n"
    result = _runner.invoke(app, ["chat", str(folder), "--max-tokens", "8"], input=lines)
    assert result.exit_code == 0, result.output
    answers = re.findall("model › (.*)", result.stdout)
    assert len(answers) == 3
    assert answers[0] == answers[2]
    assert "The conversation is forgotten." in result.stdout


def test_a_drawn_answer_is_repeated_by_its_seed(folder: Path) -> None:
    def draw(seed: str) -> str:
        options = ["--prompt", "Who?", "--temperature", "3", "--seed", seed, "--max-tokens", "8"]
        return _runner.invoke(app, ["chat", str(folder), *options]).stdout

    assert draw("1") == draw("1")
    assert draw("1") != draw("2")


def test_a_conversation_longer_than_the_context_says_so(folder: Path) -> None:
    (session,) = open_sessions(str(folder), compare_base=False)
    with pytest.raises(ValueError, match=r"such as NAME@champion \(sft models lists them\)"):
        open_sessions(str(folder), compare_base=True)
    assert len(render_questions(["word " * 600], session.tokenizer)[0]) > 512
    with pytest.raises(ValueError, match="/reset begins anew"):
        list(answer(session, "word " * 600, _SAMPLING))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["chat", str(_BASE_MODEL), "--prompt", "x"], "has no chat template"),
        (["chat", "--prompt", "x"], "there is none: sft run makes one"),
        (["chat", "nosuch@champion", "--prompt", "x"], "no registered model 'nosuch'"),
        (["chat", "a/b/c", "--prompt", "x"], "write NAME, NAME/VERSION or NAME@alias"),
        (["promote", "nosuch"], "no registered model 'nosuch'"),
        (["promote", "nosuch/3"], "no model of this name is registered; sft models lists all"),
        (["rollback", "nosuch"], "no registered model 'nosuch'"),
        (["publish", "/nowhere/rows.jsonl"], "no such file or folder"),
    ],
)
def test_what_is_not_there_is_named(command: list[str], words: str) -> None:
    result = _runner.invoke(app, command)
    assert result.exit_code == 1
    assert words in result.stderr.replace("\n", " ")
