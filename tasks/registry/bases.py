"""Base models that are versions of the registry: `models:/NAME/VERSION` or `models:/NAME@alias`, trained further."""

from pathlib import Path

from schemas.artifacts import ModelRef
from schemas.config import ModelConfig
from tasks import tracking
from tasks.base_model import BaseModelError, locate_base_model, locate_tokenizer
from tasks.registry.exports import FORM_TAG
from tasks.registry.versions import CHAMPION, MODEL_TAG, find_by_address, find_version, get_version

SCHEME = "models:/"


def find_base_model(config: ModelConfig) -> ModelRef:
    """Return a reference to the base model: a version of the registry, a folder, or a model of the hub.

    Raises:
        ValueError: there is none such, or it is no model that can be trained.
    """
    if not config.base_model.startswith(SCHEME):
        return locate_base_model(config)
    name, version = find_by_address(config.base_model, default_alias=CHAMPION)
    found = get_version(name, version)
    digest = found.tags.get(MODEL_TAG)
    if digest is None or found.tags.get(FORM_TAG):
        what = "is an export, which cannot be trained" if digest else "was not registered by this pipeline"
        raise BaseModelError(
            f"model.base_model = {config.base_model!r}: {name} version {version} {what}: name another version, or give "
            "a folder with config.json and safetensors weights"
        )
    return ModelRef(uri=str(found.source), digest=digest, name=f"{name}/{version}")


def find_tokenizer_folder(config: ModelConfig) -> Path:
    """Return a folder with the base model's tokenizer; of a model of the hub, its weights are not fetched."""
    if config.base_model.startswith(SCHEME):
        return tracking.resolve(find_base_model(config))
    return locate_tokenizer(config)


def find_base_again(config: ModelConfig, digest: str) -> ModelRef:
    """Return the base model of an earlier run; of a version that was named by an alias, the one that it was then."""
    if config.base_model.startswith(SCHEME):
        name = config.base_model.removeprefix(SCHEME).split("/")[0].split("@")[0]
        found = find_version(name, MODEL_TAG, digest)
        if found is not None:
            return ModelRef(uri=str(found.source), digest=digest, name=f"{name}/{found.version}")
    return find_base_model(config)
