"""Model versions and aliases in the MLflow registry."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow.models import ModelSignature
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA

from tasks import tracking

CHALLENGER = "challenger"
CHAMPION = "champion"
_SERVING_CODE = Path(__file__).with_name("serving.py")
_SERVING_PACKAGES = ("mlflow", "torch", "transformers", "accelerate")


def log_merged_model(folder: Path, run_id: str, *, question: str) -> str:
    """Log a merged model's folder as an MLflow model with signature and input example; return `models:/m-…`.

    The files are copied as they are and no weights are loaded. They lie at artifacts/model in the version, because
    MLflow keeps the folder's own name.
    """
    assert folder.name == Path(tracking.MODEL_SUBFOLDER).name, folder
    tracking.client()
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        info = mlflow.pyfunc.log_model(
            name="merged_model",
            python_model=str(_SERVING_CODE),
            artifacts={"model": str(folder)},
            signature=ModelSignature(inputs=CHAT_MODEL_INPUT_SCHEMA, outputs=CHAT_MODEL_OUTPUT_SCHEMA),
            input_example={"messages": [{"role": "user", "content": question}], "max_tokens": 64},
            pip_requirements=_requirements(),
            metadata={"task": "llm/v1/chat"},
        )
    return f"models:/{info.model_id}"


def create_version(
    name: str, model_uri: str, *, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str], description: str
) -> str:
    """Register a logged model as a new version with its tags and metrics; return the version.

    Aliases are given last and apart, so that an interrupted registration leaves a version that nobody is sent to.
    """
    client = tracking.client()
    model_id = model_uri.removeprefix("models:/")
    for metric, value in metrics.items():
        client.log_metric(run_id, metric, value, model_id=model_id)
    try:
        client.create_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name, source=model_uri, run_id=run_id, tags=dict(tags), description=description, model_id=model_id
    )
    return str(created.version)


def find_version(name: str, tag: str, value: str) -> str | None:
    """Return the newest version that carries this tag, or None."""
    found = tracking.client().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"])
    return next((str(entry.version) for entry in found if entry.tags.get(tag) == value), None)


def set_alias(name: str, alias: str, number: str) -> None:
    """Point an alias at a version; MLflow moves it in one step."""
    tracking.client().set_registered_model_alias(name, alias, number)


def aliases_of(name: str, number: str) -> tuple[str, ...]:
    """Return a version's aliases, sorted."""
    return tuple(sorted(tracking.client().get_model_version(name, number).aliases))


def _requirements() -> list[str]:
    return [f"{package}=={version(package).split('+')[0]}" for package in _SERVING_PACKAGES]
