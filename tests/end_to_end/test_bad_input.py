"""Bad input: one readable message (what, where, limit, remedy), a Failed flow, nothing half registered."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.settings import PREFECT_API_URL
from safetensors.torch import load_file, save_file

from schemas.artifacts import DatasetRef
from tasks import tracking
from tasks.ingestion.dataset import build_dataset
from tasks.registry.listing import list_runs
from tests.end_to_end.conftest import BASE_MODEL, ROOT, RunPipeline

pytestmark = pytest.mark.slow
_GOOD = [{"instruction": f"Say {n}.", "input": "", "output": f"The number {n}."} for n in range(20)]


def _last_flow_state() -> str:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import FlowRunSort

    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert run.state is not None
    return run.state.type.value


def _lines(*rows: Any) -> bytes:
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


_CASES: dict[str, tuple[bytes, list[str]]] = {
    "empty file": (b"", ["rows.jsonl", "empty"]),
    "broken JSON on line 3": (_lines(*_GOOD[:2], '{"instruction": \n', *_GOOD[2:]), ["rows.jsonl:3"]),
    "wrong columns": (_lines(*({"a": n, "b": n} for n in range(5))), ["'a'", "'b'", "data.columns"]),
    "nulls": (_lines(*_GOOD, {"instruction": "x", "input": "", "output": None}), ["rows.jsonl:21"]),
    "ends with the user": (
        _lines(
            *(
                {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "a"}]}
                for n in range(9)
            ),
            {"messages": [{"role": "user", "content": "hello"}]},
        ),
        ["rows.jsonl:10", "ends_with_user"],
    ),
    "an answer of only spaces": (
        _lines(*_GOOD, {"instruction": "x", "input": "", "output": "  \n "}),
        ["rows.jsonl:21", "empty_answer"],
    ),
    "every row rejected": (
        _lines(*({"instruction": str(n), "input": "", "output": ""} for n in range(9))),
        ["empty_answer", "9"],
    ),
    "not UTF-8": (b'{"instruction": "caf\xe9", "input": "", "output": "x"}\n', ["rows.jsonl", "byte 21"]),
}


@pytest.mark.parametrize(("content", "words"), list(_CASES.values()), ids=list(_CASES))
def test_bad_data_fails_with_one_message(
    run_pipeline: RunPipeline, tmp_path: Path, content: bytes, words: list[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        run_pipeline({"data": {"source": str(path)}, "registry": {"name": "never"}})
    for word in words:
        assert word in str(caught.value)
    assert _last_flow_state() == "FAILED"
    assert [model.name for model in tracking.client().search_registered_models("name = 'never'")] == []


def test_a_dataset_that_changes_while_it_is_read_ends_the_run(
    run_pipeline: RunPipeline, write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows([{**row, "output": f"{row['output']} Indeed."} for row in _GOOD])

    def build_and_write(*args: Any, **settings: Any) -> Any:
        counts = build_dataset(*args, **settings)
        with path.open("a") as file:
            file.write(json.dumps(_GOOD[0]) + "\n")
        return counts

    monkeypatch.setattr("tasks.ingestion.task.build_dataset", build_and_write)
    settings = {"data": {"source": str(path)}, "registry": {"name": "never"}}
    with pytest.raises(ValueError, match=r"rows\.jsonl: the files were changed while they were read"):
        run_pipeline(settings)
    assert _last_flow_state() == "FAILED"


def test_a_model_path_that_does_not_exist(run_pipeline: RunPipeline, write_rows: Callable[..., Path]) -> None:
    settings = {"data": {"source": str(write_rows(_GOOD))}, "model": {"base_model": "./no/such/model"}}
    with pytest.raises(ValueError, match=r"model\.base_model = './no/such/model': no such folder"):
        run_pipeline(settings)
    assert _last_flow_state() == "FAILED"
    (newest,) = list_runs(limit=1)
    assert newest.failure.startswith("BaseModelError: model.base_model = './no/such/model': no such folder")


def test_weights_that_can_hide_code_are_refused(
    run_pipeline: RunPipeline, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "pickled"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"no \*\.safetensors weights \(found pytorch_model\.bin"):
        run_pipeline({"data": {"source": str(write_rows(_GOOD))}, "model": {"base_model": str(model)}})


def _damage_model(damage: str, folder: Path) -> None:
    """Copy the demo's base model with other weights than its config and its tokenizer tell of."""
    shutil.copytree(BASE_MODEL, folder)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if damage == "no head":
        config["tie_word_embeddings"] = False
    elif damage == "a tensor more":
        weights["model.layers.0.mlp.spare_proj.weight"] = torch.zeros(4, 4)
    else:
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:2040].clone()
        config |= {"vocab_size": 2040, "eos_token_id": 1, "pad_token_id": 1}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no head", r"1 weight is missing from the files: lm_head\.weight"),
        ("a tensor more", r"1 weight is unknown to the model in the files: model\.layers\.0\.mlp\.spare_proj\.weight"),
        ("few rows", r"as id 204\d, and the model's embedding has 2040 rows: take the tokenizer that belongs to this"),
    ],
)
def test_weights_of_another_model_are_refused_before_a_row_is_read(
    run_pipeline: RunPipeline, write_rows: Callable[..., Path], tmp_path: Path, damage: str, said: str
) -> None:
    _damage_model(damage, tmp_path / "base")
    settings = {"data": {"source": str(write_rows(_GOOD))}, "model": {"base_model": str(tmp_path / "base")}}
    with pytest.raises(ValueError, match=said):
        run_pipeline(settings)
    (newest,) = list_runs(limit=1)
    assert tracking.recall(newest.run, "ingest", DatasetRef) is None


def _sft(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli", "run", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_prints_an_unknown_key_and_fails(command_environment: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {base_model: b}\ndata: {source: d}\ntraining: {epochs: 3}\n")
    done = _sft(command_environment, str(path))
    assert done.returncode == 1
    assert "training.epochs: unknown setting; did you mean num_epochs?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("run_pipeline")
def test_the_command_prints_a_missing_dataset_once_and_writes_the_failure(
    command_environment: dict[str, str], tmp_path: Path
) -> None:
    # The session's Prefect server spares the command the start of one of its own.
    environment = {**command_environment, "PREFECT_API_URL": str(PREFECT_API_URL.value())}
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {{base_model: {ROOT}/deploy/demo/base_model}}\ndata: {{source: ./nowhere.jsonl}}\n")
    done = _sft(environment, str(config), "--report", str(tmp_path / "report.json"))
    assert done.returncode == 1
    assert done.stderr.count("nowhere.jsonl") <= 2
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == "failed"
    assert "nowhere.jsonl" in report["message"]
