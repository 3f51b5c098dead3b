"""Base models that are versions of the registry: `models:/NAME/VERSION` or `models:/NAME@alias`, trained further."""

from schemas.artifacts import ModelRef
from schemas.config import ModelConfig
from tasks.base_model import BaseModelError
from tasks.registry.exports import FORM_TAG
from tasks.registry.versions import CHAMPION, MODEL_TAG, find_by_address, find_version, get_version


def find_base_version(config: ModelConfig) -> ModelRef:
    """Return a reference to the version that a config names.

    Raises:
        ValueError: there is none such, or it is no model that can be trained.
    """
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


def find_version_again(name: str, digest: str) -> ModelRef | None:
    """Return a reference to the version of a model with these weights, or None where there is none."""
    found = find_version(name, MODEL_TAG, digest)
    return None if found is None else ModelRef(uri=str(found.source), digest=digest, name=f"{name}/{found.version}")
