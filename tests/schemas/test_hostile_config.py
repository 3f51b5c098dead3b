"""A YAML file that is no config is an error of a few lines: never a traceback, never a flood."""

from pathlib import Path

import pytest

from schemas.loading import ConfigError, load_config, override_config

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
BASE = "model: {base_model: m}\ndata: {source: d}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 10,000 values"),
        ("a: &a [*a]\n", "an alias refers to a value that contains it"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML"),
        ("a: 2001-99-99\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("? {a: 1}\n: b\n", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        (BASE + "seed: [" + "x, " * 5000 + "x]\n", "seed = "),
        ("3", "a mapping of sections is wanted"),
    ],
)
def test_hostile_file_is_a_short_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_aliases_of_a_usual_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(BASE + "name: &n x\nregistry: {name: *n}\n")
    assert load_config(tmp_path / "c.yaml").registry.name == "x"


@pytest.mark.parametrize("field", ["model.base_model", "data.source", "data.eval_source", "model.chat_template"])
def test_unknown_home_is_a_wrong_setting(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = '~nosuchuser/x'.*write the whole path"):
        override_config({"model": {"base_model": "m"}, "data": {"source": "d"}}, (f"{field}='~nosuchuser/x'",))


def test_override_is_an_error_too() -> None:
    values = {"model": {"base_model": "m"}, "data": {"source": "d"}}
    with pytest.raises(ConfigError, match="not a YAML value"):
        override_config(values, ("seed=2001-99-99",))
    with pytest.raises(ConfigError, match="is a value, not a section"):
        override_config(values, ("model.base_model.x=1",))
