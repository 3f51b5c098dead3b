"""A base model that cannot be trained or merged into is refused before anything is evaluated, in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.preflight import check_model
from schemas.config import TrainingConfig
from tests.tasks.families.tiny import save_model


@pytest.mark.parametrize("case", ["qwen3", "deepseek_v3", "gpt_oss", "llama4", "qwen3_5_moe", "nemotron_h"])
def test_a_model_that_can_be_trained_passes(case: str, tmp_path: Path) -> None:
    check_model(save_model(case, tmp_path), TrainingConfig())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"dropout": 0.1}, "training.dropout is 0.1, which does not go with weights of this Qwen3MoeForCausalLM"),
        ({"use_dora": True}, "training.use_dora is True, which does not go with weights"),
        ({"target_modules": ("c_attn",)}, "training.target_modules names 'c_attn'.*choose from .*q_proj"),
    ],
)
def test_settings_that_do_not_go_with_the_model(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        check_model(save_model("qwen3_moe", tmp_path), TrainingConfig(**settings))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder model.*choose a decoder-only one"),
        ({"model_type": "clip"}, "clip .* is no language model that writes text token by token: choose a causal one"),
        ({"model_type": "blip-2"}, "Blip2ForConditionalGeneration needs pixel_values, so that it is not trained here"),
        ({"model_type": "qwen2_5_omni"}, "Qwen2_5OmniForConditionalGeneration takes no text by itself.*choose a lang"),
        ({"model_type": "never-heard-of"}, "describes no model that this transformers knows"),
    ],
)
def test_what_is_no_causal_language_model(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=said):
        check_model(tmp_path, TrainingConfig())


def test_quantized_and_missing_weights(tmp_path: Path) -> None:
    tensors = load_file(save_model("qwen3", tmp_path) / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    quantized = {**tensors, name: tensors[name].to(torch.float8_e4m3fn)}
    save_file(quantized, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj.weight: the base model stores F8_E4M3.*choose the unquantized"):
        check_model(tmp_path, TrainingConfig())
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj.weight: none of the base model's 23 stored weights is this one"):
        check_model(tmp_path, TrainingConfig())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"down_proj.weight: this checkpoint is quantized \(gptq\).*choose the unq"):
        check_model(tmp_path, TrainingConfig())


def test_layers_that_transformers_leaves_out_are_told(tmp_path: Path) -> None:
    """Of the families whose class knows that their checkpoints have them."""
    file = save_model("qwen3_next", tmp_path) / "model.safetensors"
    assert check_model(tmp_path, TrainingConfig()) == ()
    further = {"mtp.fc.weight": torch.zeros(32, 64), "mtp.norm.weight": torch.zeros(32)}
    save_file({**load_file(file), **further}, file, metadata={"format": "pt"})
    (told,) = check_model(tmp_path, TrainingConfig())
    assert told.startswith("1 matrix of the files is no part of Qwen3NextForCausalLM in transformers, such as mtp.fc.w")


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    file = save_model("gemma3", tmp_path) / "model.safetensors"
    tensors, name = load_file(file), "vision_tower.encoder.layers.0.layer_norm1.bias"
    (stored,) = [found for found in tensors if found.endswith(name)]
    save_file({**tensors, stored: torch.zeros(17)}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"shapes differ: .*layer_norm1.bias is \[17\] and not \[16\]: fetch the whole"
    ):
        check_model(tmp_path, TrainingConfig())
