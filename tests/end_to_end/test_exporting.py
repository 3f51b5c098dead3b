"""A version becomes a GGUF file that is registered beside it, and one that is too far from it does not."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.targets import TargetError, fetch_version
from schemas.artifacts import ComparisonReport, MergedRef
from tasks import tracking
from tasks.models import load_tokenizer
from tasks.registry.exports import FORM_TAG, PARENT_TAG
from tasks.registry.versions import CHAMPION, RUN_TAG, find_champions, get_version, read_alias
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline
from tests.llama_cpp import Question, ask_llama_cpp, why_missing

pytestmark = pytest.mark.slow

_SURE = "It is a number."


def export(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["export", *words, "--json"])
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    return values


def compare_answers(run_id: str, file: Path, folder: Path) -> None:
    """llama.cpp gives what the evaluation of the version was given, and ends where it ended.

    The version is sure of some answers; in others several digits are as likely, and rounding decides.
    """
    comparison = tracking.recall(run_id, "compare", ComparisonReport)
    assert comparison is not None
    table = pl.read_parquet(tracking.resolve(comparison) / "table.parquet").filter(pl.col("answer_after") == _SURE)
    assert len(table) >= 8
    merged = tracking.recall(run_id, "merge", MergedRef)
    assert merged is not None
    tokenizer: Any = load_tokenizer(tracking.resolve(merged))
    questions = [[{"role": "user", "content": question}] for question in table["question"]]
    prompts = [tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"] for turns in questions]
    reading = ask_llama_cpp([Question(str(file), (), (), prompts)], folder, num_tokens=len(tokenizer))[0]
    answers = [tokenizer.decode(answer, skip_special_tokens=True) for answer in reading.answers]
    same = sum(one.strip() == other.strip() for one, other in zip(answers, table["answer_after"], strict=True))
    assert same >= 0.8 * len(answers), list(zip(answers, table["answer_after"], strict=True))
    assert sum(reading.have_ended) >= 0.8 * len(answers)


def test_an_export_is_a_version_of_its_own_with_its_proof(
    run_pipeline: RunPipeline, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(60)]
    rows += [{"instruction": f"What is {n}?", "output": _SURE} for n in range(60)]
    settings: dict[str, Any] = {
        "name": "exported",
        "model": {"base_model": str(BASE_MODEL)},
        "data": {"source": str(write_rows(rows)), "eval_fraction": 0.3},
        "training": {"rank": 4, "num_epochs": 2, "learning_rate": 1e-3},
        "evaluation": {"batch_size": 16, "max_new_tokens": 24, "num_resamples": 200},
        "registry": {"name": "exported"},
    }
    report = run_pipeline(settings)
    champions = find_champions()
    made = export("exported/1", "--output", str(tmp_path / "files"))
    assert made["version"] == "exported-gguf-q8_0/1"
    assert made["proof"]["acceptance"] >= 0.97
    assert made["proof"]["mean_kl"] < 0.001
    assert made["proof"]["num_stops"] > 0
    assert made["num_examples"] == report.evaluation.num_examples
    assert made["before"]["nll"] == pytest.approx(report.evaluation.after["nll"], rel=1e-3)
    assert abs(made["delta"]["nll"]["value"]) < 0.05
    assert made["num_bytes"] < 0.5 * made["parent_bytes"]
    assert {path.name for path in (tmp_path / "files").iterdir()} == {
        "exported-1-q8_0.gguf",
        "Modelfile",
        "proof.json",
    }
    if not why_missing():
        compare_answers(report.mlflow_run_id, tmp_path / "files" / "exported-1-q8_0.gguf", tmp_path)
    entry = get_version("exported-gguf-q8_0", "1")
    assert (entry.tags[PARENT_TAG], entry.tags[FORM_TAG]) == ("exported/1", "gguf-q8_0")
    assert entry.tags[RUN_TAG] == report.mlflow_run_id
    assert tracking.get_run(str(entry.run_id)).data.metrics["export/agreement"] == made["proof"]["agreement"]

    if find_spec("compressed_tensors") is not None:
        packed = export("exported/1", "--format", "int8")
        assert packed["version"] == "exported-int8/1"
        assert packed["proof"]["acceptance"] >= 0.97
        assert packed["num_bytes"] < 0.6 * packed["parent_bytes"]
        assert (Path(packed["folder"]) / "tokenizer.json").is_file()

    assert find_champions() == champions
    assert read_alias("exported-gguf-q8_0", CHAMPION) is None
    again = export("exported/1", "--format", "gguf-q8_0")
    assert (again["version"], again["is_new"], again["proof"]) == (made["version"], False, made["proof"])
    with pytest.raises(TargetError, match="the model that it was made of is exported/1"):
        fetch_version("exported-gguf-q8_0", "1")

    refused = CliRunner().invoke(app, ["export", "exported/1", "--format", "gguf-q4_0", "--min-agreement", "1.0"])
    assert refused.exit_code == 1
    assert "is not registered" in refused.output
    unknown = CliRunner().invoke(app, ["export", "exported/1", "--format", "onnx"])
    assert "--format onnx: there are gguf-f32" in unknown.output
