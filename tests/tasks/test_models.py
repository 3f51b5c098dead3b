"""Models load from safetensors in a folder, and say what they lack."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tasks.models import ModelError, choose_dtype, load_model, load_tokenizer, read_context_length
from tests.tasks.families.packed import save_packed

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_tokenizer_that_loads_and_encodes_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(Path("deploy/demo/base_model") / name, tmp_path / name)
    assert load_tokenizer(tmp_path)("a")["input_ids"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": "long"}))
    with pytest.raises(ModelError, match="no tokenizer loads from here"):
        load_tokenizer(tmp_path)


def test_weights_keep_their_dtype_unless_another_is_asked_for(folder: Path) -> None:
    assert load_model(folder).dtype == torch.bfloat16
    model = load_model(folder, dtype=torch.float32)
    assert (model.dtype, model.training) == (torch.float32, False)


def _point_at(folder: Path, name: object) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    torch.save(names, folder / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["weights.bin", "../weights.safetensors", "/tmp/w.safetensors", 3, None, ["a"]])
def test_an_index_that_names_other_files_is_refused_before_anything_is_read(
    folder: Path, name: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("pickled weights were read"))
    _point_at(folder, name)
    with pytest.raises(ModelError, match=r"index\.json: it names .*only \*\.safetensors files in the same folder"):
        load_model(folder)


def test_an_index_that_names_a_missing_file_is_refused(folder: Path) -> None:
    _point_at(folder, "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"it names model-00001-of-00002\.safetensors, which is missing"):
        load_model(folder)


@pytest.mark.parametrize("text", ["3", "{", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json: "):
        load_model(folder)


def test_other_ways_to_name_weights_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    torch.save(load_file(folder / "model.safetensors"), folder / "adapter_model.bin")
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ModelError, match=r"config\.json: it names 'adapter_model\.bin'"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).dtype == torch.bfloat16
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    with pytest.raises(ModelError, match="makes this an adapter"):
        load_model(folder)


def test_a_truncated_weights_file_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="no language model loads from here"):
        load_model(folder)


def test_a_folder_without_tokenizer_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer lies here"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({}, None),
    ],
)
def test_context_length_is_read_from_the_config(tmp_path: Path, values: object, length: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_context_length(tmp_path) == length


def test_a_cpu_computes_in_fp32_unless_told_otherwise() -> None:
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == torch.float32
    assert choose_dtype("bf16", cpu) == torch.bfloat16


def test_missing_and_unknown_weights_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.spare.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing from the files: model.layers.0.mlp.up_proj.weight; .*spare.weight"):
        load_model(folder)


def test_attention_is_what_the_family_has(tmp_path: Path) -> None:
    config = GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1)
    GptOssForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(tmp_path).config._attn_implementation == "eager"


def test_a_composite_loads_as_the_composite(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **TINY},
        vision_config={"model_type": "pixtral", **vision, "head_dim": 8, "image_size": 28, "patch_size": 14},
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is Mistral3ForConditionalGeneration
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)


def test_an_encoder_decoder_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="t5 is an encoder-decoder model, which is not trained here"):
        load_model(tmp_path)


def test_experts_in_mxfp4_are_unpacked_into_the_wanted_dtype(tmp_path: Path) -> None:
    wanted = save_packed(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        parameters = dict(load_model(tmp_path, dtype=dtype).named_parameters())
        assert {parameter.dtype for parameter in parameters.values()} == {dtype}
        assert len(wanted) == 2
        for name, values in wanted.items():
            assert torch.equal(parameters[name].float(), values)
