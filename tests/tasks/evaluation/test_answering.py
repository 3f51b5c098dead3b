"""Rows that several processes share are answered and scored as one does, whichever of them are lost."""

import os
import signal
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from schemas.config import EvaluationConfig
from tasks import cluster, execution
from tasks.cluster_connection import ADDRESS
from tasks.evaluation import answering
from tasks.evaluation.answering import Answered, Terms, answer_share
from tasks.evaluation.scoring import Evaluation, EvaluationError, evaluate_sets
from tests.tasks.cluster_nodes import start_nodes
from tests.tasks.evaluation.test_scoring import QUESTION, make_model, save

ROOT = Path(__file__).resolve().parents[3]
NUM_ROWS = 23


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Rows of uneven lengths, and a probe of two."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    generator = torch.Generator().manual_seed(3)

    def draw(number: int) -> list[int]:
        return torch.randint(5, 13, (number,), generator=generator).tolist()

    for name, count in (("eval", NUM_ROWS), ("probe", 2)):
        rows = [(draw(2 + row % 7), [*draw(1 + row % 4), 4]) for row in range(count)]
        frame = pl.DataFrame(
            {
                "example_id": [f"{row:016x}" for row in range(count)],
                "question": ["?"] * count,
                "reference": ["i am red"] * count,
                "input_ids": pl.Series([prompt + target for prompt, target in rows], dtype=pl.List(pl.Int32)),
                "labels": pl.Series(
                    [[-100] * len(prompt) + target for prompt, target in rows], dtype=pl.List(pl.Int32)
                ),
            }
        )
        frame.write_parquet(tmp_path / f"{name}.parquet")
    return tmp_path


def evaluate(model: Path, tokens: Path, num_processes: int) -> tuple[Evaluation, list[tuple[int, int]]]:
    told: list[tuple[int, int]] = []
    config = EvaluationConfig(num_processes=num_processes, max_new_tokens=6, questions=(QUESTION, "red ?"))
    found = evaluate_sets(
        model, tokens, config, lambda done, of: told.append((done, of)), probes={"probe": tokens / "probe.parquet"}
    )
    return found, told


def check_same(one: Evaluation, other: Evaluation) -> None:
    assert one.answers == other.answers
    for left, right in ((one.rows, other.rows), (one.probes["probe"], other.probes["probe"])):
        for name in left.columns:
            if name == "nll_sum":
                assert left[name].to_list() == pytest.approx(right[name].to_list(), abs=1e-5)
            else:
                assert left[name].to_list() == right[name].to_list(), name


def test_two_processes_answer_and_score_as_one_and_a_lost_one_is_replaced(
    model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "ROWS_A_SHARE", 4)
    alone, _ = evaluate(model, tokens, 1)
    assert alone.rows.height == NUM_ROWS
    monkeypatch.setattr(answering, "answer_share", answer_or_die)
    monkeypatch.setenv("SFT_TEST_MARKS", str(tokens))
    together, told = evaluate(model, tokens, 2)
    check_same(together, alone)
    assert told[-1] == (2 * NUM_ROWS + 2 * 2 + 2, 2 * NUM_ROWS + 2 * 2 + 2)
    workers = {path.name.removeprefix("worker-") for path in tokens.glob("worker-*")}
    assert (tokens / "killed").is_dir()
    assert len(workers) >= 3  # two, and what came for the killed one
    assert str(os.getpid()) not in workers


def answer_or_die(model: Path, tokenizer: Path, share: Path, terms: Terms) -> Answered:
    """Answer a share; the first process that comes to the second one is killed."""
    marks = Path(os.environ["SFT_TEST_MARKS"])
    (marks / f"worker-{os.getpid()}").touch()
    if share.name == "share-1.json":
        try:
            (marks / "killed").mkdir()
        except FileExistsError:
            return answer_share(model, tokenizer, share, terms)
        os.kill(os.getpid(), signal.SIGKILL)
    return answer_share(model, tokenizer, share, terms)


def test_a_row_longer_than_the_context_is_refused_before_anything_is_started(model: Path, tokens: Path) -> None:
    frame = pl.read_parquet(tokens / "eval.parquet")
    long = frame.with_columns(
        pl.Series("input_ids", [[5] * 3000] * NUM_ROWS, dtype=pl.List(pl.Int32)),
        pl.Series("labels", [[-100] + [5] * 2999] * NUM_ROWS, dtype=pl.List(pl.Int32)),
    )
    long.write_parquet(tokens / "eval.parquet")
    with pytest.raises(EvaluationError, match="3000 tokens, but the model's context is"):
        evaluate_sets(model, tokens, EvaluationConfig(num_processes=2))


@pytest.mark.skipif(os.environ.get("SFT_TEAM_TESTS") != "all", reason="SFT_TEAM_TESTS=all brings it")
@pytest.mark.skipif(find_spec("ray") is None, reason="the ray extra is not installed")
def test_a_cluster_answers_and_scores_a_large_set_as_this_machine(
    model: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone, _ = evaluate(model, tokens, 1)
    monkeypatch.setattr(answering, "FEWEST_ROWS_FOR_CLUSTER", NUM_ROWS)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tasks' / 'unimported'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-the-tests-with-32-letters")
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    sent: list[tuple[str, int]] = []

    def listen(function: Callable[..., Any], calls: Sequence[Any], *arguments: Any, **options: Any) -> list[Any]:
        sent.append((function.__name__, len(calls)))
        return spread(function, calls, *arguments, **options)

    spread = cluster.map
    monkeypatch.setattr(cluster, "map", listen)
    with start_nodes(2) as nodes:
        monkeypatch.setenv(ADDRESS, nodes.address)
        assert execution.count_model_places("cpu") == 2
        assert execution.count_model_places("cuda") == 0
        try:
            there, _ = evaluate(model, tokens, 1)
        finally:
            execution.stop()
    check_same(there, alone)
    assert sent == [("answer_share", 2), ("answer_share", 2)]
