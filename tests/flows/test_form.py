"""The fields above the sections of Prefect's form: first, over the sections, and never silently without effect."""

from typing import Any

import pytest
from jsonschema import validate  # type: ignore[import-untyped]
from prefect.utilities.callables import parameter_schema

from flows.form import ALL_SETTINGS, put_on
from flows.pipeline import choose_config, sft_pipeline
from schemas.config import RunConfig
from schemas.loading import ConfigError, parse_config

SCHEMA = parameter_schema(sft_pipeline).model_dump()


def make(**sections: Any) -> RunConfig:
    return parse_config({"model": {"base_model": "m"}, "data": {"source": "rows.jsonl"}, **sections})


def test_what_most_people_change_comes_first_with_its_title() -> None:
    fields = sorted(SCHEMA["properties"].values(), key=lambda each: each["position"])
    titles = [each["title"] for each in fields]
    assert titles[:5] == ["Base model", "Dataset", "Epochs", "Learning rate", "All settings"]
    assert titles[5:] == ["Recipe of a published dataset", "Go on with an interrupted run"]
    assert all(each["description"] for each in fields)
    assert all("type" in each for each in fields[:4])  # a choice of null has no field in the form
    assert SCHEMA["required"] == ["config"]


def test_fields_that_are_filled_in_count_and_empty_ones_do_not() -> None:
    config = make(training={"rank": 8, "learning_rate": 1e-3})
    given = {"base_model": "models:/mine@champion", "dataset_uri": "", "num_epochs": 2.0, "learning_rate": 0.0}
    found = put_on(config, given)
    assert (found.model.base_model, found.data.source) == ("models:/mine@champion", "rows.jsonl")
    assert (found.training.num_epochs, found.training.learning_rate, found.training.rank) == (2.0, 1e-3, 8)
    assert put_on(config, {"dataset_uri": None}) is config
    assert put_on(config, {"dataset_uri": "a: b # c"}).data.source == "a: b # c"


@pytest.mark.parametrize(
    ("sections", "given", "message"),
    [
        ({"training": {"sweep": {"learning_rates": [1e-4, 2e-4]}}}, {"learning_rate": 1e-3}, "tried in its place"),
        ({"training": {"max_steps": 9}}, {"num_epochs": 2.0}, "training.max_steps is 9"),
        ({"model": {"base_model": "m", "revision": "abc"}}, {"base_model": "n"}, "model.revision is abc"),
    ],
)
def test_a_field_that_goes_against_a_setting_is_refused(
    sections: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        put_on(make(**sections), given)


def test_parameters_of_earlier_releases_still_start_a_run() -> None:
    values = make().model_dump(mode="json")
    for saved in (
        {"config": values},
        {"config": values, "dataset_uri": "datasets:/a/1", "recipe": "a", "resume": "never"},
    ):
        validate(saved, SCHEMA)
        assert sft_pipeline.validate_parameters(saved)["config"] == make()
    found = sft_pipeline.validate_parameters({"config": values, "dataset_uri": None})  # as an old schedule has it
    assert found["dataset_uri"] is None
    assert choose_config(found["config"], "", {"dataset_uri": None}) == make()


def test_a_script_that_gives_no_config_is_told() -> None:
    with pytest.raises(ConfigError, match="sft_pipeline has no config"):
        choose_config(ALL_SETTINGS, "", {})
