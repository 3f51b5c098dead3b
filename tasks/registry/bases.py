"""Base models by what a config says: a version of the registry, a folder, or a model of the hub.

MLflow, which holds the versions, is imported where a config names one: a folder or the hub does without.
"""

from pathlib import Path

from schemas.artifacts import ModelRef
from schemas.config import ModelConfig
from tasks.base_model import locate_base_model, locate_tokenizer

SCHEME = "models:/"


def find_base_model(config: ModelConfig) -> ModelRef:
    """Return a reference to the base model: a version of the registry, a folder, or a model of the hub.

    Raises:
        ValueError: there is none such, or it is no model that can be trained.
    """
    if not config.base_model.startswith(SCHEME):
        return locate_base_model(config)
    from tasks.registry.base_versions import find_base_version

    return find_base_version(config)


def find_tokenizer_folder(config: ModelConfig) -> Path:
    """Return a folder with the base model's tokenizer; of a model of the hub, its weights are not fetched."""
    if not config.base_model.startswith(SCHEME):
        return locate_tokenizer(config)
    from tasks import tracking

    return tracking.resolve(find_base_model(config))


def find_base_again(config: ModelConfig, digest: str) -> ModelRef:
    """Return the base model of an earlier run; of a version that was named by an alias, the one that it was then."""
    if config.base_model.startswith(SCHEME):
        from tasks.registry.base_versions import find_version_again

        name = config.base_model.removeprefix(SCHEME).split("/")[0].split("@")[0]
        found = find_version_again(name, digest)
        if found is not None:
            return found
    return find_base_model(config)
