"""Model versions and aliases in the MLflow registry.

`challenger` is the newest version that passed its checks, `champion` the one in use, `previous` the champion before.
"""

import re
import shutil
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import mlflow
import mlflow.pyfunc  # by its name: MLflow itself puts it off until the first model is written, within a stage
from mlflow.entities import LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.types.llm import CHAT_MODEL_INPUT_SCHEMA, CHAT_MODEL_OUTPUT_SCHEMA
from mlflow.types.schema import AnyType, ColSpec, Schema

from tasks import prompts, tracking

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
RUN_TAG, PARITY_TAG = "sft.run", "sft.parity"
MODEL_TAG, VERSION_TAG = "sft.model_digest", "sft.version"
GATE_TAG, REASONS_TAG = "sft.gate_verdict", "sft.gate_reasons"
ROLLED_BACK_TAG = "sft.rolled_back"
ANSWERS_TAG = "sft.serving_probes"
_ADDRESS = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[A-Za-z0-9_-]+))?")
_NUM_NAMED = 20  # of versions, in a message
_SERVING_CODE = Path(__file__).with_name("serving.py")
_WEIGHTS = ".safetensors"
_SERVING_PACKAGES = ("mlflow", "torch", "transformers", "accelerate")


@tracking.tracking_time()
def log_merged_model(folder: Path, run_id: str, *, question: str) -> str:
    """Log a merged model's folder as an MLflow model with signature and input example; return `models:/m-…`.

    The files are copied as they are and no weights are loaded. They lie at artifacts/model in the version, because
    MLflow keeps the folder's own name.
    """
    assert folder.name == Path(tracking.MODEL_SUBFOLDER).name, folder
    clear_pending(run_id)
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        # As mlflow.pyfunc.log_model does it, but for its trial request, which loads the weights again and answers.
        info = Model.log(
            artifact_path=None,
            name="merged_model",
            flavor=SimpleNamespace(save_model=_save_model),
            flavor_name="pyfunc",
            validate_serving_input=False,
            python_model=str(_SERVING_CODE),
            artifacts={"model": str(folder), "prompts": str(prompts.__file__)},
            model_config={"weights": True},
            signature=ModelSignature(inputs=_describe_request(), outputs=CHAT_MODEL_OUTPUT_SCHEMA),
            input_example={"messages": [{"role": "user", "content": question}], "max_tokens": 64},
            pip_requirements=_requirements(),
            metadata={"task": "llm/v1/chat"},
        )
    return f"models:/{info.model_id}"


def clear_pending(run_id: str) -> None:
    """Delete the models that killed attempts of a run began to log, files and entries; finished ones stay."""
    client = tracking.client()
    found = client.search_logged_models(
        [str(tracking.get_run(run_id).info.experiment_id)], f"source_run_id = '{run_id}'"
    )
    for model in found:
        if model.status != LoggedModelStatus.READY:
            get_artifact_repository(model.artifact_location).delete_artifacts()
            client.delete_logged_model(model.model_id)


def _describe_request() -> Schema:
    """Return MLflow's chat request, with messages and tools of any shape that chat servers take."""
    anything = {"messages", "tools"}
    return Schema(
        [
            ColSpec(AnyType(), column.name, required=column.required) if column.name in anything else column
            for column in CHAT_MODEL_INPUT_SCHEMA.inputs
        ]
    )


def _save_model(
    *, path: str, mlflow_model: Model, artifacts: dict[str, str], validate_serving_input: bool, **settings: Any
) -> None:
    """Write the files of a model, its weights as links: MLflow copies them only where it keeps them.

    Args:
        path: folder that MLflow takes to its store, links followed.
        mlflow_model: its description.
        artifacts: the merged model's folder, as `model`, and other files.
        validate_serving_input: for the caller.
        settings: of `mlflow.pyfunc.save_model`.
    """
    folder = Path(artifacts["model"])
    weights = sorted(folder.glob(f"*{_WEIGHTS}"))
    with TemporaryDirectory() as beside:
        light = Path(beside) / folder.name
        shutil.copytree(folder, light, ignore=shutil.ignore_patterns(f"*{_WEIGHTS}"))
        mlflow.pyfunc.save_model(
            path=path, mlflow_model=mlflow_model, artifacts={**artifacts, "model": str(light)}, **settings
        )
    saved = Path(path) / "artifacts" / folder.name
    for file in weights:
        (saved / file.name).symlink_to(file)
    mlflow_model.model_size_bytes = (mlflow_model.model_size_bytes or 0) + sum(file.stat().st_size for file in weights)
    mlflow_model.save(str(Path(path) / MLMODEL_FILE_NAME))


@tracking.tracking_time()
def create_version(
    name: str,
    model_uri: str,
    *,
    run_id: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    description: str = "",
) -> ModelVersion:
    """Register a logged model as a new version with its tags, description and metrics.

    Aliases are given last and apart, so that an interrupted registration leaves a version that nobody is sent to.
    """
    model_id = model_uri.removeprefix("models:/")
    measure = partial(tracking.log_metrics, run_id, metrics, model_id=model_id)
    create = partial(
        tracking.client().create_model_version,
        name,
        source=model_uri,
        run_id=run_id,
        tags=dict(tags),
        description=description,
        model_id=model_id,
    )
    try:
        created: ModelVersion = tracking.at_once(create, measure)[0]
        return created
    except mlflow.MlflowException as error:
        # The second: people may add to what is theirs, and what does not exist is nobody's.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
    try:
        tracking.client().create_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run made it in between
            raise
    return create()


@tracking.tracking_time()
def update_version(entry: ModelVersion, *, tags: Mapping[str, str], description: str) -> ModelVersion:
    """Set tags and description of a version; return it as it is then."""
    name, number = entry.name, str(entry.version)
    for tag, value in tags.items():
        tracking.client().set_model_version_tag(name, number, tag, value)
    return tracking.client().update_model_version(name, number, description=description)


def find_version(name: str, tag: str, value: str) -> ModelVersion | None:
    """Return the newest version that carries this tag, or None."""
    query = f"name = '{name}' AND tags.`{tag}` = '{value}'"
    found = tracking.client().search_model_versions(query, order_by=["version_number DESC"], max_results=1)
    return found[0] if found else None


def find_newest(name: str) -> str | None:
    """Return the newest version of a registered model, or None where there is none."""
    found = tracking.client().search_model_versions(f"name = '{name}'", order_by=["version_number DESC"], max_results=1)
    return str(found[0].version) if found else None


def find_by_address(address: str, *, default_alias: str) -> tuple[str, str]:
    """Return name and version of `NAME`, `NAME/VERSION` or `NAME@alias`, each also with `models:/` before it.

    Raises:
        ValueError: it is none of these, or the registry knows none such.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address!r} names no version: write NAME, NAME/VERSION or NAME@alias, such as demo/3")
    name, version = match["name"], match["version"]
    if version is not None:
        return name, str(get_version(name, version).version)
    alias = match["alias"] or default_alias
    found = read_alias(name, alias)
    if found is None:
        known = [f"{key} (version {number})" for key, number in sorted(get_model(name).aliases.items())]
        raise ValueError(
            f"{address}: {name} has no alias {alias} at {tracking.tracking_uri()}: "
            + (f"it has {', '.join(known)}" if known else "it has none")
        )
    return name, found


def find_champions() -> list[str]:
    """Return the registered models that have a champion, by name."""
    models = tracking.client().search_registered_models(max_results=1000)
    return sorted(model.name for model in models if CHAMPION in model.aliases)


def get_model(name: str) -> RegisteredModel:
    """Return a registered model; raise ValueError when there is none of this name."""
    try:
        return tracking.client().get_registered_model(name)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        known = [model.name for model in tracking.client().search_registered_models(max_results=20)]
        raise ValueError(
            f"no registered model {name!r} at {tracking.tracking_uri()}: "
            + (f"known are {', '.join(known)}" if known else "none is registered")
        ) from None


def get_version(name: str, number: str) -> ModelVersion:
    """Return a version; raise ValueError when the registry knows none such."""
    try:
        return tracking.client().get_model_version(name, number)
    except mlflow.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise ValueError(f"{name} version {number} at {tracking.tracking_uri()}: {error.message}") from None
        known = tracking.client().search_model_versions(f"name = '{name}'", max_results=_NUM_NAMED)
        numbers = ", ".join(str(version.version) for version in reversed(known))
        raise ValueError(
            f"{name} version {number} is not known at {tracking.tracking_uri()}: "
            + (f"there are {numbers}" if numbers else "no model of this name is registered")
            + "; sft models lists all"
        ) from None


def read_alias(name: str, alias: str) -> str | None:
    """Return the version behind an alias, or None."""
    try:
        return str(tracking.client().get_model_version_by_alias(name, alias).version)
    except mlflow.MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, no such alias
            return None
        raise


def drop_alias(name: str, alias: str) -> None:
    """Take an alias away."""
    tracking.client().delete_registered_model_alias(name, alias)


def set_alias(name: str, alias: str, number: str) -> None:
    """Point an alias at a version; MLflow moves it in one step."""
    tracking.client().set_registered_model_alias(name, alias, number)


def aliases_of(name: str, number: str) -> tuple[str, ...]:
    """Return a version's aliases, sorted."""
    return tuple(sorted(tracking.client().get_model_version(name, number).aliases))


def _requirements() -> list[str]:
    return [f"{package}=={version(package).split('+')[0]}" for package in _SERVING_PACKAGES]
