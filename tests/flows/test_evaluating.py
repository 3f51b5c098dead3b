"""`sft evaluate` on a model's folder, an adapter, trained weights and a checkpoint, beside the base or alone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.evaluating import evaluate_target
from flows.targets import Target
from schemas.artifacts import ModelRef, Ref
from schemas.config import DataConfig, EvaluationConfig, RunConfig, TrainingConfig
from tasks import tracking
from tasks.evaluation.scoring import evaluate_model
from tasks.ingestion.dataset import build_dataset
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer
from tasks.training.cards import complete_folder
from tasks.training.loop import train_adapter
from tasks.training.process.messages import TrainingJob, write_job

BASE_MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "base_model"
LIMITS = (
    "--set", "evaluation.max_new_tokens=6", "--set", "evaluation.num_resamples=100",
    "--set", "data.max_rejected_fraction=0.5",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    values: list[dict[str, Any]] = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(24)]
    values += [values[0], {"prompt": "No answer?", "completion": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in values))
    return file


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a training of an adapter and one of all weights, as the pipeline leaves them."""
    place = tmp_path_factory.mktemp("trained")
    data = DataConfig(source=str(rows), eval_fraction=0.0, max_rejected_fraction=1.0)
    build_dataset(data, seed=0, folder=place / "dataset")
    prepared = prepare_tokenizer(BASE_MODEL, None)
    from schemas.config import TokenizationConfig

    tokenize_dataset(place / "dataset", prepared, place / "tokens", TokenizationConfig(max_length=128))
    for method in ("lora", "full"):
        config = TrainingConfig.model_validate(
            {"method": method, "rank": 4, "alpha": 8, "learning_rate": 3e-3, "num_epochs": 4, "micro_batch": 8}
        )
        job = TrainingJob(BASE_MODEL, place / "tokens", place / method, config, seed=0, identity="x")
        (place / method).mkdir()
        write_job(job, place / method / "job.json")
        outcome = train_adapter(BASE_MODEL, place / "tokens", place / method, config, seed=0, identity="x")
        base = ModelRef(uri=str(BASE_MODEL), digest="d" * 64, name=str(BASE_MODEL))
        complete_folder(outcome.adapter, place / "tokens" / "tokenizer", base, config)
    return place


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_an_adapter_its_checkpoint_and_the_merged_model_are_measured_alike(
    trained: Path, rows: Path, tmp_path: Path
) -> None:
    for method, folder in (("lora", "adapter"), ("full", "trained_weights")):
        merged = call("merge", trained / method / folder, tmp_path / method, "--base-model", BASE_MODEL)
        assert merged.exit_code == 0, merged.output
        checkpoint = max((trained / method / "checkpoints").glob("step-*"))
        found = {}
        for number, target in enumerate((trained / method / folder, checkpoint, tmp_path / method)):
            file = tmp_path / f"{method}-{number}.json"
            result = call("evaluate", target, rows, "--base-model", BASE_MODEL, "--json", file, *LIMITS)
            assert result.exit_code == 0, result.output
            found[number] = json.loads(file.read_text())
        assert found[0]["metrics"] == found[1]["metrics"] == found[2]["metrics"]
        assert found[0]["base"] == "base_model"
        assert found[0]["metrics"]["nll"] < found[0]["base_metrics"]["nll"] - 0.5
        change = found[0]["delta"]["nll"]
        assert change["ci_high"] < 0
        assert change["value"] == pytest.approx(found[0]["metrics"]["nll"] - found[0]["base_metrics"]["nll"])

    # The same figures as the pipeline's own evaluation of these rows.
    shutil.copyfile(trained / "tokens" / "train.parquet", trained / "tokens" / "eval.parquet")
    settings = EvaluationConfig(max_new_tokens=6)
    _, expected, _ = evaluate_model(tmp_path / "full", trained / "tokens", settings)
    assert found[0]["metrics"] == pytest.approx(expected)


def test_every_row_is_accounted_for_and_answers_are_written(trained: Path, rows: Path, tmp_path: Path) -> None:
    options = ["--json", tmp_path / "a.json", "--answers", tmp_path / "out" / "a.parquet", "--no-base"]
    adapter = trained / "lora" / "adapter"
    result = call("evaluate", adapter, rows, *options, *LIMITS, "--set", "evaluation.max_examples=20")
    assert result.exit_code == 0, result.output
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["rows"] == {
        "rows in": 26, "evaluated": 20, "not asked": 4, "duplicates": 1, "rejected: empty_answer": 1,
    }  # fmt: skip
    assert (values["base"], values["delta"]) == ("", {})
    assert "26 rows in = 20 evaluated + 4 not asked + 1 duplicate + 1 rejected: empty_answer" in result.stdout
    assert "4 rows are not asked: evaluation.max_examples = 20, which --set changes" in result.stdout
    assert pl.read_parquet(tmp_path / "out" / "a.parquet").height == 20


def test_a_plain_model_is_measured_alone(rows: Path) -> None:
    result = call("evaluate", BASE_MODEL, rows, *LIMITS)
    assert result.exit_code == 0, result.output
    assert "base_model on 24 rows" in result.stdout
    assert "interval" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere/model", "x.jsonl"), "nowhere/model: there is no such folder in "),
        (("unknown-name", "x.jsonl"), "there is no such folder in "),
        (("unknown-name", "x.jsonl"), "no registered model 'unknown-name'"),
    ],
)
def test_what_is_not_there_is_named(arguments: tuple[str, ...], words: str) -> None:
    result = call("evaluate", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr.replace("\n", " ")


def test_a_trained_folder_can_be_used_by_itself(trained: Path) -> None:
    for method, name in (("lora", "adapter"), ("full", "trained_weights")):
        folder = trained / method / name
        assert (folder / "tokenizer.json").is_file()
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"| method | `{method}` |" in card
        assert f"| base model | `{BASE_MODEL}` |" in card
        assert "More Information Needed" not in card
        assert call("chat", folder, "--prompt", "Say 3.", "--max-tokens", "4").exit_code == 0


def test_rows_that_the_version_was_trained_on_are_counted(rows: Path, tmp_path: Path) -> None:
    """Of 24 rows that it was asked it was trained on ten, and another file's ten."""
    values = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(14, 34)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    build_dataset(
        DataConfig(source=str(tmp_path / "own.jsonl"), eval_fraction=0.0), seed=0, folder=tmp_path / "dataset"
    )
    run = tracking.client().create_run(tracking.open_experiment("evaluating")).info.run_id
    uri, digest = tracking.publish(tmp_path / "dataset", run, "dataset")
    config = RunConfig.model_validate(
        {
            "name": "x",
            "model": {"base_model": str(BASE_MODEL)},
            "data": {"source": str(rows), "max_rejected_fraction": 0.5},
            "evaluation": {"max_new_tokens": 4, "num_resamples": 100},
            "registry": {"name": "x"},
        }
    )
    target = Target("mine version 1", BASE_MODEL, None, dataset=Ref(uri=uri, digest=digest))
    found = evaluate_target(target, config, with_base=False)
    assert (found.rows["evaluated"], found.num_trained_on) == (24, 10)
    assert found.warning.startswith("mine version 1 was trained on 10 of 24 rows")
    folder = evaluate_target(Target("base", BASE_MODEL, None), config, with_base=False)
    assert (folder.num_trained_on, folder.warning) == (None, "")
