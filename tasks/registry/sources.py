"""The datasets of a config: published ones get their version's address, or the path of their files on this machine.

MLflow, which holds the published ones, is imported where a config names one: to read files it is not needed.
"""

from collections.abc import Callable
from typing import Any

from schemas.config import DataConfig
from tasks.addresses import PUBLISHED


def pin_sources(config: DataConfig) -> DataConfig:
    """Name the version of each published dataset that is meant by its name alone.

    Raises:
        PublicationError: it is not published.
    """
    return _change_sources(config, _pin)


def bring_sources(config: DataConfig) -> DataConfig:
    """Put local paths in the place of published datasets, downloading what this machine does not have."""
    return _change_sources(config, _bring)


def _change_sources(config: DataConfig, change: Callable[[str], str]) -> DataConfig:
    """Return the config with each of its sources changed."""
    update: dict[str, Any] = {"source": change(config.source)}
    if config.eval_source is not None:
        update["eval_source"] = change(config.eval_source)
    update["mixture"] = tuple(part.model_copy(update={"source": change(part.source)}) for part in config.mixture)
    return config.model_copy(update=update)


def _pin(source: str) -> str:
    if not source.startswith(PUBLISHED):
        return source
    from tasks.registry.publication import find_published

    return find_published(source).address


def _bring(source: str) -> str:
    if not source.startswith(PUBLISHED):
        return source
    from tasks import tracking
    from tasks.registry.publication import find_published

    folder = tracking.resolve(find_published(source))
    files = [path for path in folder.rglob("*") if path.is_file()]
    # A single file is read whatever its name; in a folder, names such as test.jsonl are held out.
    return str(files[0] if len(files) == 1 else folder)
