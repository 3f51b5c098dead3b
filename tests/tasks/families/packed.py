"""A tiny gpt-oss whose experts are packed in MXFP4, and matrices packed in FP8, as their makers' checkpoints are."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

_SIZES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SHAPE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "pad_token_id": 0,
}


def save_packed(folder: Path) -> dict[str, Tensor]:
    """Save the model; return what its packed matrices [E, inputs, outputs] hold: 4 bits a value, the low half first."""
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM(GptOssConfig(**_SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)
    weights, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith((".gate_up_proj", ".down_proj"))]:
        num_experts, num_in, num_out = weights.pop(name).shape
        blocks = torch.randint(0, 256, (num_experts, num_out, num_in // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, blocks.shape[:-1], dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        halves = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(3).long()
        numbers = _SIZES[halves & 7] * torch.where(halves >= 8, -1.0, 1.0)
        values[name] = (numbers * 2.0 ** (scales.float() - 127)[..., None]).flatten(2).mT
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return values


def pack_in_fp8(folder: Path, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Pack a checkpoint's matrices in FP8 with a factor for each 16 x 16 values, those of layer 0 with one for all.

    Returns:
        What they hold, in bf16, by name.
    """
    weights, values = load_file(folder / "model.safetensors"), {}
    weights = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    for name in [name for name in weights if name.endswith(ends)]:
        matrix = weights[name].float()
        is_one = ".layers.0." in name
        rows, columns = (1, 1) if is_one else (size // 16 for size in matrix.shape)
        blocks = matrix.view(rows, -1, columns, matrix.shape[1] // columns)
        factors = blocks.abs().amax((1, 3), keepdim=True) / 448
        packed = (blocks / factors).to(torch.float8_e4m3fn)
        values[name] = (packed.float() * factors).to(torch.bfloat16).view(matrix.shape)
        weights[name] = packed.view(matrix.shape)
        weights[f"{name}_scale_inv"] = factors.view(()).clone() if is_one else factors.view(rows, columns).clone()
        if is_one:
            weights[f"{name.removesuffix('weight')}activation_scale"] = torch.ones(())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    (folder / "config.json").write_text(json.dumps(config))
    return values
