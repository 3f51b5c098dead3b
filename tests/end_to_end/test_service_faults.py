"""Processes are really killed, servers really gone, disks really full; a training loses nothing and holds no GPU.

The runs here are those of the deployment `train`, with data that one pipeline run prepared.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.gpu_stages import TRAIN
from flows.service import processes
from flows.service.servers import GPU_WORKER, MLFLOW, PREFECT
from schemas.artifacts import AdapterRef, TokensRef
from schemas.config import RunConfig
from schemas.loading import parse_config
from tasks import storage, tracking
from tests.end_to_end.service import Service, small_config, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("SFT_SERVICE_TESTS" not in os.environ, reason="takes minutes: set SFT_SERVICE_TESTS=1"),
]
_SECONDS = 240  # for one step of a test; a busy machine of two cores takes its time
_AWAY_SECONDS = 10
StartTraining = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def prepared(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Base model and tokens as `train` takes them, and this process pointed at the service."""
    from tasks.ingestion.base_model import locate_base_model
    from tasks.ingestion.dataset import build_dataset
    from tasks.tokenization.examples import tokenize_dataset
    from tasks.tokenization.templates import prepare_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**service.client, "SFT_HOME": str(service.home)}.items():
            patch.setenv(name, value)
        config = parse_config(small_config(tmp_path_factory.mktemp("rows")))
        base_model = locate_base_model(config.model)
        run_id = tracking.create_parent_run(config, run_name="prepared", config_digest="none", tags={})
        with storage.new_folder() as folder:
            build_dataset(config.data, seed=0, folder=folder / "dataset")
            template = prepare_tokenizer(Path(base_model.uri), None)
            counts = tokenize_dataset(folder / "dataset", template, folder / "tokens", config.tokenization)
            uri, digest = tracking.publish(folder / "tokens", run_id, "tokens")
        tracking.end_run(run_id, "FINISHED")
        fields = set(TokensRef.model_fields) - {"uri", "digest", "mlflow_run_id", "template_digest"}
        tokens = TokensRef(
            uri=uri,
            digest=digest,
            mlflow_run_id=run_id,
            template_digest=template.template_digest,
            **{name: getattr(counts, name) for name in fields},
        )
        yield {"config": config, "base_model": base_model, "tokens": tokens}


@pytest.fixture
def start_training(service: Service, prepared: dict[str, Any]) -> StartTraining:
    """Give a function that starts a training as a pipeline run would, and returns Prefect's and MLflow's run id."""

    def start(num_steps: int = 150, parent: str | None = None) -> tuple[str, str]:
        config: RunConfig = prepared["config"]
        if parent is None:
            parent = tracking.create_parent_run(config, run_name="fault", config_digest="none", tags={})
        training = {**config.training.model_dump(mode="json"), "max_steps": num_steps, "num_epochs": 1000}
        parameters = {
            "base_model": prepared["base_model"].model_dump(mode="json"),
            "tokens": prepared["tokens"].model_dump(mode="json"),
            "config": training,
            "seed": 0,
            "parent_run_id": parent,
        }
        return service.start(TRAIN, parameters), parent

    return start


def _checkpoints(service: Service, parent: str) -> list[Path]:
    return list((service.home / "runs" / parent / "train" / "checkpoints").glob("step-*"))


def _wait_for_checkpoint(service: Service, flow_run: str, parent: str) -> psutil.Process:
    """Wait until a training has left a checkpoint, and return its process."""
    service.wait(flow_run, {"Running"}, seconds=_SECONDS)
    wait_until(lambda: bool(_checkpoints(service, parent)), seconds=_SECONDS)
    return service.process_of(flow_run)


def _steps(parent: str) -> list[int]:
    """Return the steps on the training curve, in the order of their writing."""
    (run,) = tracking.client().search_runs(
        [tracking.get_run(parent).info.experiment_id], f"tags.`{tracking.PARENT_TAG}` = '{parent}'"
    )
    return [metric.step for metric in tracking.client().get_metric_history(run.info.run_id, "train/loss")]


def _slots_taken(service: Service) -> int:
    return int(service.deployment(TRAIN)["global_concurrency_limit"]["active_slots"])


def test_a_worker_that_dies_does_not_take_the_training_with_it(service: Service, start_training: StartTraining) -> None:
    flow_run, parent = start_training()
    training = _wait_for_checkpoint(service, flow_run, parent)
    worker = processes.find(service.folder, GPU_WORKER)
    assert worker is not None
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    assert training.is_running()
    service.wait(flow_run, {"Completed"}, seconds=_SECONDS)
    assert tracking.recall(parent, "train", AdapterRef) is not None
    assert sorted(set(_steps(parent))) == list(range(1, 151))
    service.bring_back(GPU_WORKER)
    assert processes.find(service.folder, GPU_WORKER) is not None
    assert _slots_taken(service) == 0


def test_one_gpu_takes_one_run_and_a_cancelled_one_makes_way(service: Service, start_training: StartTraining) -> None:
    first, first_parent = start_training(5000)
    training = _wait_for_checkpoint(service, first, first_parent)
    second, second_parent = start_training(20)
    service.wait(second, {"AwaitingConcurrencySlot", "Late", "Scheduled", "Pending"}, seconds=_SECONDS)
    assert service.run(first)["state"]["name"] == "Running"
    assert _slots_taken(service) == 1
    # As the page's Cancel button does.
    service.prefect("POST", f"/flow_runs/{first}/set_state", {"state": {"type": "CANCELLING"}})
    service.wait(first, {"Cancelled"}, seconds=_SECONDS)
    training.wait(30)
    assert not training.is_running()
    service.wait(second, {"Completed"}, seconds=_SECONDS)
    assert _slots_taken(service) == 0
    assert tracking.recall(second_parent, "train", AdapterRef) is not None


@pytest.mark.parametrize("name", [PREFECT, MLFLOW])
def test_a_server_that_is_gone_for_a_while_costs_no_step(
    service: Service, start_training: StartTraining, name: str
) -> None:
    flow_run, parent = start_training()
    _wait_for_checkpoint(service, flow_run, parent)
    processes.stop(service.folder, name)
    time.sleep(_AWAY_SECONDS)
    service.bring_back(name)
    service.wait(flow_run, {"Completed"}, seconds=_SECONDS)
    assert sorted(set(_steps(parent))) == list(range(1, 151))


def test_a_full_disk_fails_the_training_and_a_retry_goes_on_from_the_last_checkpoint(
    service: Service, start_training: StartTraining, prepared: dict[str, Any]
) -> None:
    parent = tracking.create_parent_run(prepared["config"], run_name="full disk", config_digest="none", tags={})
    folder = storage.run_folder(parent) / "train" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        flow_run, _ = start_training(150, parent)
        state = service.wait(flow_run, {"Failed"}, seconds=_SECONDS)["state"]
        assert "No space left on device" in state["message"]
        assert _slots_taken(service) == 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        before = {path.name for path in _checkpoints(service, parent)}
        again, _ = start_training(150, parent)
        service.wait(again, {"Completed"}, seconds=_SECONDS)
        steps = _steps(parent)
        assert sorted(set(steps)) == list(range(1, 151))
        assert before
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
