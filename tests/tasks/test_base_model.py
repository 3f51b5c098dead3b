"""The base model comes from a folder or the hub, with safetensors weights and without its code."""

import json
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from schemas.config import ModelConfig
from tasks.base_model import MODEL_FILES, OTHER_COPIES, BaseModelError, locate_base_model, locate_tokenizer


def _folder(path: Path, config: object = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_a_folder_is_named_and_digested_by_its_content(tmp_path: Path) -> None:
    first = locate_base_model(ModelConfig(base_model=str(_folder(tmp_path / "one"))))
    second = locate_base_model(ModelConfig(base_model=str(_folder(tmp_path / "two"))))
    assert (first.name, first.kind, first.digest) == ("one", "base", second.digest)
    (tmp_path / "two" / "model.safetensors").write_bytes(b"other weights")
    assert locate_base_model(ModelConfig(base_model=str(tmp_path / "two"))).digest != first.digest


@pytest.mark.parametrize("name", ["./missing", "/no/such/model", "a/b/c", "~/no-such-model"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_name(name: str) -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        locate_base_model(ModelConfig(base_model=name))


def test_a_hub_name_that_cannot_be_fetched_says_so() -> None:
    with pytest.raises(
        BaseModelError,
        match=r"'nobody/nothing': no such folder in .*, and the hub did not give it \(.*\): correct the name",
    ):
        locate_base_model(ModelConfig(base_model="nobody/nothing"))


def test_the_weights_are_fetched_once() -> None:
    """The hub's own filter, over what the repositories of gpt-oss and Mistral hold."""
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    others = ["consolidated.safetensors", "original/model.safetensors", "metal/model.bin", "original/config.json"]
    found = filter_repo_objects([*wanted, *others], allow_patterns=MODEL_FILES, ignore_patterns=list(OTHER_COPIES))
    assert list(found) == wanted


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match=r"config\.json is missing"):
        locate_base_model(ModelConfig(base_model=str(tmp_path / "empty")))


def test_an_adapter_alone_is_refused_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"makes this an adapter.*merge the adapter into it first \(sft merge\)"):
        locate_base_model(ModelConfig(base_model=str(tmp_path)))


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    (folder / "config.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"config\.json: not valid JSON"):
        locate_base_model(ModelConfig(base_model=str(folder)))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"no \*\.safetensors weights \(found pytorch_model\.bin"):
        locate_base_model(ModelConfig(base_model=str(folder)))


def test_an_index_that_names_pickled_weights_beside_a_decoy_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    (folder / "weights.bin").write_bytes(b"pickled")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "weights.bin"}}))
    with pytest.raises(BaseModelError, match=r"index\.json: it names 'weights\.bin'"):
        locate_base_model(ModelConfig(base_model=str(folder)))


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model", {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}})
    with pytest.raises(BaseModelError, match="code of its own"):
        locate_base_model(ModelConfig(base_model=str(folder)))


def test_a_tokenizer_needs_no_weights(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert locate_tokenizer(ModelConfig(base_model=str(folder))) == folder
