"""The model's own weights trained by the whole pipeline: a registered version, proven, that chat and merge take too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.chatting import SamplingConfig, answer, open_sessions
from flows.evaluating import evaluate_target
from flows.exporting import export_merged
from flows.targets import TargetError, copy_version, opening_target
from schemas.artifacts import AdapterRef, MergedRef
from schemas.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig
from tasks import storage, tracking
from tasks.models import load_model
from tests.end_to_end.conftest import BASE_MODEL, RunPipeline

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("method", ["full", "freeze"])
def test_becomes_a_registered_version(run_pipeline: RunPipeline, tmp_path: Path, method: str) -> None:
    rows = [{"prompt": f"Say {n}.", "completion": f"The number {n} comes after {n - 1}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training: dict[str, Any] = {"method": method, "learning_rate": 1e-3, "num_epochs": 2, "micro_batch": 4}
    if method == "freeze":
        training |= {"trained_layers": 1, "trained_modules": ["model.norm"]}
    report = run_pipeline(
        {
            "name": "own-weights",
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "training": training,
            "evaluation": {"max_new_tokens": 8, "num_resamples": 100},
            "registry": {"name": f"own-{method}"},
        }
    )
    run = report.mlflow_run_id
    names = {name for name, _ in load_model(BASE_MODEL).named_parameters()}
    last = max(int(name.split(".")[2]) for name in names if ".layers." in name)
    trained = names if method == "full" else {n for n in names if f".layers.{last}." in n or n == "model.norm.weight"}
    assert report.registry.name == f"own-{method}"
    assert report.merge.num_changed == len(trained)
    assert report.merge.num_kept == len(names) - len(trained)
    assert report.merge.greedy_agreement == 1.0
    assert any("is a rate for LoRA" in warning for warning in report.evaluation.warnings)

    weights, merged = tracking.recall(run, "train", AdapterRef), tracking.recall(run, "merge", MergedRef)
    assert weights is not None
    assert merged is not None
    assert weights.method == method
    checkpoint = max((storage.run_folder(run) / "train" / "checkpoints").glob("step-*"))
    written = load_model(tracking.resolve(merged)).state_dict()
    for number, folder in enumerate((tracking.resolve(weights), checkpoint)):
        check = export_merged(str(BASE_MODEL), str(folder), tmp_path / f"merged-{number}", max_shard_size="5GB")
        assert check.differs_from_base
        again = load_model(tmp_path / f"merged-{number}").state_dict()
        assert all(torch.equal(again[name], written[name]) for name in names)
    sampling = SamplingConfig(max_new_tokens=8)
    base, tuned = open_sessions(str(checkpoint), compare_base=True)
    (whole,) = open_sessions(str(tracking.resolve(merged)), compare_base=False)
    said = ["".join(answer(session, "Say 3.", sampling)) for session in (base, tuned, whole)]
    assert said[1] == said[2] != said[0]

    with opening_target(f"own-{method}/1") as target:  # of the registry, beside its base
        assert target.base == BASE_MODEL
        assert target.label == f"own-{method} version 1"
        data = DataConfig(source=str(tmp_path / "rows.jsonl"), max_rows=20)
        evaluation = EvaluationConfig(max_new_tokens=4, num_resamples=100)
        config = RunConfig(model=ModelConfig(base_model="unused"), data=data, evaluation=evaluation)
        found = evaluate_target(target, config, with_base=True)
    assert (found.rows["rows in"], found.rows["evaluated"]) == (20, 20)
    assert found.metrics["nll"] < found.base_metrics["nll"]
    assert copy_version(f"own-{method}/1", tmp_path / "copy") == f"own-{method} version 1"
    assert all(torch.equal(load_model(tmp_path / "copy").state_dict()[name], written[name]) for name in names)
    with pytest.raises(TargetError, match="is not empty"):
        copy_version(f"own-{method}/1", tmp_path / "copy")
