import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.config import MergeConfig
from tasks.merging.parity import ParityError, check_merge
from tasks.merging.weights import merge_adapter
from tests.tasks.merging.conftest import PROMPTS, build_adapter, build_base

CONFIG = MergeConfig(probe_tokens=8)


def merge(base_model: Path, adapter: Path, tokenizer: Path, folder: Path, size: str = "5GB") -> Path:
    merge_adapter(base_model, adapter, tokenizer, folder, max_shard_size=size)
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_fp32_merge_holds(tmp_path: Path, tokenizer: Path, tied: bool) -> None:
    base_model = build_base(tmp_path / "base", tied=tied)
    adapter = build_adapter(base_model, tmp_path / "adapter")
    check = check_merge(base_model, adapter, merge(base_model, adapter, tokenizer, tmp_path / "m"), PROMPTS, CONFIG)
    assert check.max_abs_logit_diff < 1e-4
    assert check.greedy_agreement == 1.0
    assert check.differs_from_base


def test_bf16_merge_holds_with_a_difference_of_rounding(tmp_path: Path, tokenizer: Path) -> None:
    base_model = build_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = build_adapter(base_model, tmp_path / "adapter")
    check = check_merge(
        base_model, adapter, merge(base_model, adapter, tokenizer, tmp_path / "m"), PROMPTS,
        MergeConfig(probe_tokens=8, min_greedy_agreement=0.9),
    )  # fmt: skip
    assert 1e-4 < check.max_abs_logit_diff < 0.5
    assert check.differs_from_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_adapter_is_refused_as_equal_to_the_base(tmp_path: Path, tokenizer: Path, dtype: torch.dtype) -> None:
    base_model = build_base(tmp_path / "base", dtype=dtype)
    adapter = build_adapter(base_model, tmp_path / "adapter", strength=0.0)
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m")
    with pytest.raises(ParityError, match="as near to the base model as to base \\+ adapter: the training changed"):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)


def test_training_lost_in_rounding_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    base_model = build_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = build_adapter(base_model, tmp_path / "adapter", strength=1e-6)
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m")
    with pytest.raises(ParityError, match="or less than BF16 can hold"):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)


def test_base_in_place_of_the_merged_model_is_refused(base_model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"largest logit difference.*above 0\.001.*greedy tokens.*as near to the base"
    ):
        check_merge(base_model, adapter, base_model, PROMPTS, CONFIG)


def test_corrupted_shard_is_caught(base_model: Path, adapter: Path, tokenizer: Path, tmp_path: Path) -> None:
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m", "20KB")
    assert check_merge(base_model, adapter, merged, PROMPTS, CONFIG).greedy_agreement == 1.0
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    shard = merged / index["weight_map"]["model.layers.1.mlp.down_proj.weight"]
    content = shard.read_bytes()
    # Some of the weights' bytes are overwritten; the header stays as it was.
    shard.write_bytes(content[:-400] + bytes([0x40, 0x41, 0x42, 0x43]) * 100)
    with pytest.raises(ParityError, match="largest logit difference"):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)
    shard.write_bytes(content[:-400])
    with pytest.raises(ParityError, match="does not load from disk"):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)
    shard.unlink()
    with pytest.raises(ParityError, match="does not load from disk"):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)


def test_nan_in_the_merged_model_is_caught(base_model: Path, adapter: Path, tokenizer: Path, tmp_path: Path) -> None:
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m")
    tensors = load_file(merged / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError, match="largest logit difference from base \\+ adapter is nan"):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)


def test_missing_tensor_is_caught(base_model: Path, adapter: Path, tokenizer: Path, tmp_path: Path) -> None:
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m")
    tensors = load_file(merged / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ParityError):
        check_merge(base_model, adapter, merged, PROMPTS, CONFIG)


def test_limits_of_the_config_hold(base_model: Path, adapter: Path, tokenizer: Path, tmp_path: Path) -> None:
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m")
    with pytest.raises(ParityError, match=r"above 1e-12 \(F32 weights; merge\.max_logit_diff\)"):
        check_merge(base_model, adapter, merged, PROMPTS, MergeConfig(probe_tokens=8, max_logit_diff=1e-12))


def test_long_prompt_is_cut_to_the_model_and_probes_are_limited(
    base_model: Path, adapter: Path, tokenizer: Path, tmp_path: Path
) -> None:
    merged = merge(base_model, adapter, tokenizer, tmp_path / "m")
    check = check_merge(base_model, adapter, merged, [list(range(2, 90)), []], MergeConfig(num_probes=1))
    assert check.greedy_agreement == 1.0
    with pytest.raises(ParityError, match="no prompts"):
        check_merge(base_model, adapter, merged, [[]], CONFIG)
