"""Models load from safetensors in a folder, and say what they lack."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tasks.models import ModelError, choose_dtype, load_model, load_tokenizer, read_context_length


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


def test_weights_keep_their_dtype_unless_another_is_asked_for(folder: Path) -> None:
    assert load_model(folder).dtype == torch.bfloat16
    model = load_model(folder, dtype=torch.float32)
    assert (model.dtype, model.training) == (torch.float32, False)


def test_a_truncated_weights_file_is_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="no causal language model loads from here"):
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
