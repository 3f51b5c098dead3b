"""What a published dataset is trained with: its recipe, a config that is kept under the dataset's name.

A recipe says base model, settings, held-out set and the name of the registered model. The newest one counts.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from schemas.artifacts import DatasetRecipe
from schemas.config import RunConfig
from tasks import tracking
from tasks.addresses import PUBLISHED
from tasks.registry import audit, lock
from tasks.registry.publication import EXPERIMENT, PublicationError

_NAME_TAG, _NUMBER_TAG, _DIGEST_TAG = "sft.recipe_of", "sft.recipe_number", "sft.recipe_digest"


def keep_recipe(name: str, config: RunConfig, *, who: str) -> DatasetRecipe:
    """Keep a config as the recipe of a dataset, or return the newest one where it is the same.

    Args:
        name: of the dataset.
        config: its data.source is replaced by the dataset's address; local paths are made absolute, because a worker
            starts in another folder.
        who: recorded.
    """
    values = _settle(config, name)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    with lock.hold(f"dataset.{name}", holder=who):
        runs = _find_runs(name)
        if runs and runs[-1].data.tags[_DIGEST_TAG] == digest:
            return _read(runs[-1])
        number = 1 + max((int(run.data.tags[_NUMBER_TAG]) for run in runs), default=0)
        return _write(name, number, digest, values, who)


def find_recipe(name: str) -> DatasetRecipe | None:
    """Return the newest recipe of a dataset, or None."""
    runs = _find_runs(name)
    return _read(runs[-1]) if runs else None


def need_recipe(name: str) -> DatasetRecipe:
    """Return the newest recipe of a dataset.

    Raises:
        PublicationError: it has none.
    """
    recipe = find_recipe(name)
    if recipe is None:
        raise PublicationError(
            f"dataset {name} has no recipe at {tracking.tracking_uri()}: give it one with "
            f"sft publish DATA --name {name} --recipe my.yaml"
        )
    return recipe


def _settle(config: RunConfig, name: str) -> dict[str, Any]:
    """Return the values to keep: what was set, with the dataset's address and whole paths."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"]["source"] = PUBLISHED + name
    parts = [(values["model"], "base_model"), (values["model"], "chat_template"), (values["data"], "eval_source")]
    parts += [(each, "source") for each in values["data"].get("mixture", ())]
    parts += [(each, "source") for each in values.get("evaluation", {}).get("probes", ())]
    for section, key in parts:
        text = section.get(key)
        if text and not text.startswith(PUBLISHED) and (path := Path(text).expanduser()).exists():
            section[key] = str(path.absolute())
    return values


def _write(name: str, number: int, digest: str, values: dict[str, Any], who: str) -> DatasetRecipe:
    """Write the config, and only then say that the recipe is there."""
    client, title = tracking.client(), f"recipe {number} of {name}"
    run = client.create_run(tracking.open_experiment(EXPERIMENT), run_name=title)
    run_id, status = str(run.info.run_id), "FAILED"
    try:
        client.log_dict(run_id, values, tracking.CONFIG_FILE)
        registered = RunConfig.model_validate(values).registry.name
        tags = {
            "sft.published_by": who,
            "sft.published_at": audit.now(),
            MLFLOW_RUN_NOTE: f"**{title}**: new versions of `{PUBLISHED}{name}` are trained with it, as {registered}.",
            _NAME_TAG: name,
            _DIGEST_TAG: digest,
            _NUMBER_TAG: str(number),
        }
        tracking.set_tags(run_id, tags)
        status = "FINISHED"
    finally:
        tracking.end_run(run_id, status)
    return _read(tracking.get_run(run_id))


def _find_runs(name: str) -> list[Run]:
    """Return the runs that hold the recipes of a dataset, the oldest first."""
    runs = tracking.client().search_runs(
        [tracking.open_experiment(EXPERIMENT)], f"tags.`{_NAME_TAG}` = '{name}'", max_results=1000
    )
    whole = [run for run in runs if _NUMBER_TAG in run.data.tags]
    return sorted(whole, key=lambda run: int(run.data.tags[_NUMBER_TAG]))


def _read(run: Run) -> DatasetRecipe:
    run_id = str(run.info.run_id)
    config = RunConfig.model_validate(tracking.recorded_config(run_id))
    return DatasetRecipe(
        name=run.data.tags[_NAME_TAG], number=int(run.data.tags[_NUMBER_TAG]), run_id=run_id, config=config
    )
