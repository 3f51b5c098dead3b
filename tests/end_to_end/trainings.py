"""Runs of the deployment `train` on a running service, with data that is prepared once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.gpu_stages import TRAIN
from schemas.artifacts import AdapterRef, ModelRef, TokensRef
from schemas.config import RunConfig
from schemas.loading import parse_config
from tasks import storage, tracking
from tests.end_to_end.service import Service, small_config, wait_until

SECONDS = 600  # for one step of a test; a busy machine of two cores takes its time


@dataclass
class Trainings:
    """Starts trainings as a pipeline run would, and looks at what they leave."""

    service: Service
    config: RunConfig
    base_model: ModelRef
    tokens: TokensRef

    def open(self) -> str:
        """Return a new parent run in MLflow."""
        return tracking.create_parent_run(self.config, run_name="fault", config_digest="none", tags={})

    def start(self, parent: str, num_steps: int, **settings: Any) -> str:
        """Start a training for a parent run and return its flow run."""
        training = {**self.config.training.model_dump(mode="json"), "num_epochs": 1000, **settings}
        parameters = {
            "base_model": self.base_model.model_dump(mode="json"),
            "tokens": self.tokens.model_dump(mode="json"),
            "config": {**training, "max_steps": num_steps},
            "seed": 0,
            "parent_run_id": parent,
        }
        return self.service.start(TRAIN, parameters)

    def wait_for_checkpoint(self, flow_run: str, parent: str) -> psutil.Process:
        """Wait until a training has left a checkpoint, and return its process."""
        self.service.wait(flow_run, {"Running"}, seconds=SECONDS)
        wait_until(lambda: bool(self.checkpoints(parent)), seconds=SECONDS)
        return self.service.process_of(flow_run)

    def checkpoints(self, parent: str) -> list[int]:
        """Return the steps that a parent run has checkpoints of."""
        folder = self.service.home / "runs" / parent / "train" / "checkpoints"
        return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))

    def curve(self, parent: str) -> list[tuple[float, int]]:
        """Return (seconds since the epoch, step) of every point of a parent run's loss."""
        (run,) = tracking.client().search_runs(
            [tracking.get_run(parent).info.experiment_id],
            f"tags.`{tracking.PARENT_TAG}` = '{parent}' AND tags.`{tracking.STAGE_TAG}` = 'train'",
        )
        history = tracking.client().get_metric_history(run.info.run_id, "train/loss")
        return [(metric.timestamp / 1000, metric.step) for metric in history]

    def is_whole(self, parent: str, num_steps: int) -> bool:
        """Tell whether a training's result is there, and every step is on its curve."""
        steps = {step for _, step in self.curve(parent)}
        return tracking.recall(parent, "train", AdapterRef) is not None and steps == set(range(1, num_steps + 1))

    def first_step_since(self, parent: str, seconds: float) -> int:
        """Wait for a step that was done after this time, and return the first of them."""
        found: list[int] = []

        def has_begun() -> bool:
            found[:] = [step for when, step in self.curve(parent) if when >= seconds]
            return bool(found)

        wait_until(has_begun, seconds=SECONDS)
        return min(found)

    def slots_taken(self) -> int:
        """Return how many trainings hold a GPU, as the server counts."""
        return int(self.service.deployment(TRAIN)["global_concurrency_limit"]["active_slots"])


@contextmanager
def prepared_trainings(service: Service, folder: Path) -> Iterator[Trainings]:
    """Prepare base model and tokens as `train` takes them, and point this process at the service."""
    from tasks.base_model import locate_base_model
    from tasks.ingestion.dataset import build_dataset
    from tasks.tokenization.examples import tokenize_dataset
    from tasks.tokenization.templates import prepare_tokenizer

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**service.client, "SFT_HOME": str(service.home)}.items():
            patch.setenv(name, value)
        config = parse_config(small_config(folder))
        base_model = locate_base_model(config.model)
        run_id = tracking.create_parent_run(config, run_name="prepared", config_digest="none", tags={})
        with storage.new_folder() as new:
            build_dataset(config.data, seed=0, folder=new / "dataset")
            template = prepare_tokenizer(Path(base_model.uri), None)
            counts = tokenize_dataset(new / "dataset", template, new / "tokens", config.tokenization)
            uri, digest = tracking.publish(new / "tokens", run_id, "tokens")
        tracking.end_run(run_id, "FINISHED")
        fields = set(TokensRef.model_fields) - {"uri", "digest", "mlflow_run_id", "template_digest"}
        tokens = TokensRef(
            uri=uri,
            digest=digest,
            mlflow_run_id=run_id,
            template_digest=template.template_digest,
            **{name: getattr(counts, name) for name in fields},
        )
        yield Trainings(service, config, base_model, tokens)
