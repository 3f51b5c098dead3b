"""The config refuses with words that help, and is the form that Prefect shows."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.config import ModelConfig, RunConfig, TrainingConfig
from schemas.loading import ConfigError, load_config, parse_config

_CONFIGS = Path(__file__).resolve().parents[2] / "deploy" / "configs"
_SMALLEST = {"model": {"base_model": "base"}, "data": {"source": "rows.jsonl"}}


@pytest.mark.parametrize("path", sorted(_CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_file_of_the_repository_loads(path: Path) -> None:
    assert load_config(path).model.base_model


def test_configs_of_ten_models_begin_with_what_they_need() -> None:
    files = [path for path in _CONFIGS.glob("*.yaml") if not path.name.startswith("demo")]
    configs = {path.stem: load_config(path) for path in files}
    assert len({config.model.base_model for config in configs.values()}) >= 10
    assert {config.training.method for config in configs.values()} == {"lora", "full"}
    for name, config in configs.items():
        text = (_CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
        assert text.startswith("# "), name
        assert max(map(len, text.splitlines())) <= 120, name
        if name != "qwen3-0.6b":
            assert config.name == config.registry.name == name
            assert " GB" in text, name
        assert (config.training.learning_rate > 5e-5) == config.training.is_lora or config.training.rank == 16, name


def test_the_smallest_config_names_a_model_and_a_dataset() -> None:
    config = parse_config(_SMALLEST)
    assert config.training.rank == 64
    assert config.registry.gate.metric == "nll"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": {"rnk": 8}}, "training.rnk: unknown setting; did you mean rank?"),
        ({"zebra": 1}, "zebra: unknown setting; known here: name, seed, model"),
        ({"learning_rate": 1e-4}, "learning_rate: unknown setting; did you mean training.learning_rate?"),
        (
            {"training": {"max_length": 9}},
            "training.max_length: unknown setting; did you mean tokenization.max_length?",
        ),
        ({"training": {"revision": "a"}}, "did you mean model.revision or data.revision?"),
        ({"lora_rank": 8}, "lora_rank: unknown setting; did you mean training.rank?"),
        ({"training": {"cutoff_len": 8}}, "did you mean tokenization.max_length?"),
        ({"training": {"eval_fractoin": 8}}, "did you mean data.eval_fraction?"),
        ({"training": {"report_to": "tensorboard"}}, "report_to = 'tensorboard': a list is wanted: [tensorboard]"),
        ({"training": {"target_modules": "q_proj"}}, "target_modules = 'q_proj': a list is wanted: [q_proj]"),
        ({"merge": {"max_shard_size": "4G"}}, "max_shard_size = '4G': a size is wanted, such as 500MB or 4GB"),
        ({"registry": {"name": 7}}, 'registry.name = 7: a text is wanted: "7"'),
        ({"training": {"rank": 0}}, "training.rank = 0: Input should be greater than or equal to 1"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"registry": {"gate": {"guards": {"chrf": -1}}}}, "guards.chrf is -1.0: it is the largest loss"),
        ({"model": {}}, "model.base_model: missing"),
        ({"data": {"source": "a", "mixture": [{"weight": 2}]}}, "data.mixture.0.source: missing"),
        ({"data": {"source": "a", "weight": 0}}, "data.weight = 0: Input should be greater than 0"),
        ({"data": {"source": "a", "num_rows": 5, "weight": 2}}, "weight is 2 and num_rows is 5: a dataset is taken by"),
        (
            {"data": {"source": "a", "mixture": [{"source": "b", "num_rows": 5, "weight": 0.5}]}},
            "data.mixture.0 = {'source': 'b', 'num_rows': 5, 'weight': 0.5}: Value error, weight is 0.5",
        ),
        (
            {"data": {"source": "a", "mixture": [{"source": "b", "wieght": 2}]}},
            "data.mixture.0.wieght: unknown setting; did you mean weight?",
        ),
        ({"data": {"source": "a", "eval_split": "test"}}, "eval_split is 'test', but there is no eval_source"),
        ({"training": {"packing": True, "tokens_per_pack": 64}}, "training.tokens_per_pack is 64"),
        (
            {"evaluation": {"probes": [{"name": "a", "source": "x", "max_loss": 1}] * 2}},
            "probes are named a, a: give each a name of its own",
        ),
        (
            {"training": {"optimizer": "adamw_8bit", "num_processes": 2, "strategy": "zero2"}},
            "optimizer is adamw_8bit and strategy is zero2, which divides the optimizer",
        ),
        ({"training": {"method": "ful"}}, "training.method"),
        (
            {"training": {"trained_modules": ["lm_head"]}},
            "trained_modules goes with method freeze, and method is lora: leave one out",
        ),
        ({"training": {"method": "freeze", "trained_layers": 0}}, "trained_layers is 0: name trained_modules"),
        (
            {"training": {"method": "full", "dropout": 0.1, "use_dora": True}},
            "method is full, and dropout, use_dora belong to method lora: leave them out",
        ),
        ({"training": {"method": "full", "base_weights": "nf4"}}, "base_weights is nf4: only a frozen base can be"),
        (
            {"data": {"source": "a", "eval_fraction": 0}, "training": {"keep": "best"}},
            "training.keep is best, which goes by held-out rows, and data.eval_fraction is 0: hold out a part",
        ),
        ({"evaluation": {"batch_size": 0}}, "batch_size is 0: set auto, or at least 1"),
    ],
)
def test_errors_name_field_value_limit_and_way_out(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**_SMALLEST, **change}, "my.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("my.yaml: 1 wrong setting\n")


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {base_model: base}\ndata: {source: rows.jsonl}\n")
    config = load_config(path, ("training.rank=8", "evaluation.questions=[a, b]", "data.eval_source=null"))
    assert config.training.rank == 8
    assert config.evaluation.questions == ("a", "b")
    assert config.data.eval_source is None


def test_a_mixture_begins_with_the_dataset_of_the_source() -> None:
    data = {"source": "a", "weight": 2, "format": "alpaca", "mixture": [{"source": "b", "num_rows": 7}]}
    first, second = parse_config({**_SMALLEST, "data": data}).data.datasets
    assert (first.source, first.weight, first.num_rows, first.format) == ("a", 2.0, None, "alpaca")
    assert (second.source, second.weight, second.num_rows, second.format) == ("b", 1.0, 7, "auto")


def test_a_held_out_dataset_is_read_as_the_dataset_but_for_its_split() -> None:
    data = {"source": "org/rows", "eval_source": "org/rows", "subset": "en", "revision": "v1"}
    same = parse_config({**_SMALLEST, "data": data}).data.held_out_dataset
    other = parse_config({**_SMALLEST, "data": {**data, "eval_split": "test"}}).data.held_out_dataset
    assert same is not None
    assert other is not None
    assert (same.split, other.split) == ("train", "test")
    assert (other.source, other.subset, other.revision) == ("org/rows", "en", "v1")


@pytest.mark.parametrize("override", ["training.rank", "=3", "seed.x=1", "training.rank=["])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nmodel: {base_model: base}\ndata: {source: rows.jsonl}\n")
    with pytest.raises(ConfigError, match=re.escape(repr(override))):
        load_config(path, (override,))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: [", "not valid YAML"), (b"- 1", "a mapping of sections"), (b"a: \xff", "not UTF-8")],
)
def test_a_file_that_is_no_config_says_what_it_is(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: the config cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_config_is_frozen() -> None:
    config = parse_config(_SMALLEST)
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


def _sections(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [schema, *schema["$defs"].values()]


def test_every_field_of_the_form_has_a_title_a_help_text_and_a_place() -> None:
    for section in _sections(RunConfig.model_json_schema()):
        properties = section["properties"]
        assert sorted(field["position"] for field in properties.values()) == list(range(len(properties)))
        for name, field in properties.items():
            assert field.get("title") or "$ref" in field, name
            assert field.get("description") or "$ref" in field, name


def test_the_form_begins_with_what_most_people_change_and_keeps_the_rest_in_order() -> None:
    schemas = RunConfig.model_json_schema()["$defs"]

    def order(section: str) -> list[str]:
        properties = schemas[section]["properties"]
        return sorted(properties, key=lambda name: int(properties[name]["position"]))

    assert order("TrainingConfig")[:4] == ["num_epochs", "learning_rate", "rank", "alpha"]
    assert order("DataConfig")[:3] == ["source", "eval_source", "eval_fraction"]
    assert order("ModelConfig") == [*ModelConfig.model_fields]
    rest = [name for name in TrainingConfig.model_fields if name not in TrainingConfig.shown_first]
    assert order("TrainingConfig") == [*TrainingConfig.shown_first, *rest]


def test_config_and_command_line_import_without_torch() -> None:
    code = "import sys, schemas.loading, schemas.artifacts, schemas.records, flows.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_long_name_is_shown_in_part() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"base_model": "m"}, "data": {"source": "s"}, "a" * 100_000: 1})
    assert "unknown setting" in str(caught.value)
    assert len(str(caught.value)) < 1000
