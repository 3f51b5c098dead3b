"""Versions of registered models with the tags that a pipeline run leaves, and no weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tasks import tracking
from tasks.registry import versions

MakeVersion = Callable[..., str]


@pytest.fixture
def make_version(tracked: Path) -> MakeVersion:
    """Give a function that registers a version; `gate` and `parity` are the tags that promotion looks at."""
    client = tracking.client()
    run = client.create_run(tracking.open_experiment("versions"), run_name="some run")

    def make(name: str, *, gate: str = "promoted", parity: str = "passed: exactly") -> str:
        if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.create_registered_model(name)
        tags = {
            versions.RUN_TAG: str(run.info.run_id),
            versions.GATE_TAG: gate,
            versions.REASONS_TAG: "nll gained 0.5 over the base model",
        }
        if parity:
            tags[versions.PARITY_TAG] = parity
        source = f"{run.info.artifact_uri}/model"
        return str(client.create_model_version(name, source, run_id=str(run.info.run_id), tags=tags).version)

    return make
