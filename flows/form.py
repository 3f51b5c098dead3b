"""The fields that Prefect's form begins with: what most people change, above the sections that have everything."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, WithJsonSchema

from schemas.config import RunConfig
from schemas.loading import ConfigError, override_config, quote_text

SETTINGS = {
    "base_model": "model.base_model",
    "dataset_uri": "data.source",
    "num_epochs": "training.num_epochs",
    "learning_rate": "training.learning_rate",
}
"""What each of them is in the config."""


def _show(position: int, title: str, default: Any) -> Any:
    """Return the default of a flow's parameter, with its place and title in the form."""
    return Field(default=default, json_schema_extra={"position": position, "title": title})


TEXT = WithJsonSchema({"type": "string"})
"""Of a text that may be None, as schedules that an earlier release saved have it: with null as a choice, Prefect's form
has a switch in place of a field."""
BASE_MODEL = _show(0, "Base model", "")
DATASET = _show(1, "Dataset", "")
NUM_EPOCHS = _show(2, "Epochs", 0.0)
LEARNING_RATE = _show(3, "Learning rate", 0.0)
ALL_SETTINGS = _show(4, "All settings", ...)
RECIPE = _show(5, "Recipe of a published dataset", "")
RESUME = _show(6, "Go on with an interrupted run", "auto")


def put_on(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """Return a config with the fields that were filled in.

    Args:
        config: of the form's sections, or a recipe's.
        given: values by parameter; None, empty text and 0 are not filled in.

    Raises:
        ConfigError: a value is wrong, or goes against another setting.
    """
    filled = {name: given[name] for name in SETTINGS if given.get(name)}
    for name, value in filled.items():
        _refuse_conflict(config, name, value)
    if not filled:
        return config
    overrides = [
        f"{SETTINGS[name]}={quote_text(value) if isinstance(value, str) else value}" for name, value in filled.items()
    ]
    return override_config(config.model_dump(mode="json"), tuple(overrides))


def _refuse_conflict(config: RunConfig, name: str, value: Any) -> None:
    """Raise ConfigError where another setting would make a field say nothing, or something else."""
    sweep, model, training = config.training.sweep, config.model, config.training
    if name == "learning_rate" and sweep.learning_rates:
        tried = ", ".join(f"{rate:g}" for rate in sweep.learning_rates)
        raise ConfigError(
            f"learning_rate is {value:g} and training.sweep.learning_rates are {tried}, which are tried in its place: "
            "leave one of them empty"
        )
    if name == "num_epochs" and training.max_steps is not None:
        raise ConfigError(
            f"num_epochs is {value:g} and training.max_steps is {training.max_steps}, which ends the training whatever "
            "the epochs: leave one of them empty"
        )
    if name == "base_model" and model.revision is not None and value != model.base_model:
        raise ConfigError(
            f"base_model is {value} and model.revision is {model.revision}, which is one of {model.base_model}: leave "
            "the revision empty, or name the model in the section Base model"
        )
