"""What is trained beside matrices in MXFP4 or FP8 is merged into them unpacked, and packed ones stay so without."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from flows.preflight import check_model
from schemas.config import TrainingConfig
from tasks.merging.changes import MergeError
from tasks.merging.verification import verify_tensors
from tasks.merging.weights import merge_adapter, plan_merge
from tasks.models import load_model
from tests.tasks.families.packed import pack_in_fp8, save_packed
from tests.tasks.families.tiny import save_model
from tests.tasks.merging.test_layouts import train_by_hand

DEMO = Path("deploy/demo/base_model")


def merge(folder: Path, **settings: Any) -> tuple[Path, Path, Any]:
    adapter = train_by_hand(folder / "base", folder / "adapter", **settings)
    merged, tokenizer = folder / "merged", folder / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, tokenizer / name)
    plan = merge_adapter(folder / "base", adapter, tokenizer, merged, max_shard_size="5GB")
    return adapter, merged, plan


def test_adapted_experts_are_written_unpacked(tmp_path: Path) -> None:
    values = save_packed(tmp_path / "base")
    adapter, folder, plan = merge(tmp_path)
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(folder / "model.safetensors")
    packed = {f"{name}_{part}" for name in values for part in ("blocks", "scales")}
    assert len(values) == 2
    assert after.keys() == (before.keys() - packed) | values.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    # Four matrices of attention and two of experts.
    written = verify_tensors(plan, folder)
    assert (written.num_changed, written.num_kept, written.unmoved) == (6, len(after) - 6, ())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    base = load_model(tmp_path / "base", dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    for name, tensor in load_model(folder, dtype=torch.float32).state_dict().items():
        wanted = merged.state_dict()[name]
        assert ((tensor - wanted).abs() <= wanted.abs() * 2.0**-8).all(), name


def test_packed_experts_without_an_adapter_stay_packed(tmp_path: Path) -> None:
    save_packed(tmp_path / "base")
    _, folder, plan = merge(tmp_path, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    written = verify_tensors(plan, folder)
    assert (written.num_changed, written.num_kept) == (4, len(before) - 4)
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"


def test_an_expert_that_changed_unasked_is_found(tmp_path: Path) -> None:
    save_packed(tmp_path / "base")
    _, folder, plan = merge(tmp_path, target_modules=("gate_up_proj",))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.experts.down_proj"][1, 5, 7] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"1 untrained tensor differs .*experts\.down_proj"):
        verify_tensors(plan, folder)


def test_blocks_without_their_scales_are_refused(tmp_path: Path) -> None:
    save_packed(tmp_path / "base")
    adapter = train_by_hand(tmp_path / "base", tmp_path / "adapter")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"experts\.down_proj: none of the base model's"):
        plan_merge(tmp_path / "base", adapter)


@pytest.mark.parametrize("target", ["all-linear", "o_proj"])
def test_matrices_in_fp8_are_unpacked_into_bf16(target: str, tmp_path: Path) -> None:
    """All of them where one changes: the config says of all alike that they are packed."""
    values = pack_in_fp8(save_model("minimax_m2", tmp_path / "base"), ("_proj.weight", "w2.weight"))
    assert len(values) == 2 * (4 + 4)
    check_model(tmp_path / "base", TrainingConfig(target_modules=(target,)))
    adapter, folder, plan = merge(tmp_path, target_modules=(target,))
    before, after = load_file(tmp_path / "base" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert after.keys() == {name for name in before if not name.endswith(("_scale_inv", "activation_scale"))}
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    changed = {name for name, value in after.items() if not torch.equal(value, values.get(name, before[name]))}
    assert len(changed) == (2 * (4 + 12) if target == "all-linear" else 2)
    written = verify_tensors(plan, folder)
    assert (written.num_changed, written.num_kept, written.unmoved) == (len(changed), len(after) - len(changed), ())
    base = load_model(tmp_path / "base", dtype=torch.float32)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
    for name, tensor in load_model(folder, dtype=torch.float32).state_dict().items():
        wanted = merged.state_dict()[name]
        assert ((tensor - wanted).abs() <= wanted.abs() * 2.0**-8).all(), name
