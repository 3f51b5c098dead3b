"""Checkpoints of many layouts are merged by streaming: what is meant changes, all else stays, dtypes included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Chunk, PermuteForRope, WeightConverter

from schemas.config import TrainingConfig
from tasks.families.files import TRAINED_CONFIG, TRAINED_WEIGHTS
from tasks.merging.changes import LowRank, MergeError
from tasks.merging.names import Sources, divide_change
from tasks.merging.shards import write_shards
from tasks.merging.stored import StoredTensor
from tasks.merging.verification import describe_unmoved, verify_tensors
from tasks.merging.weights import plan_merge
from tasks.models import load_model
from tasks.training.lora import attach_adapter, collect_trained, save_adapter
from tests.tasks.families.tiny import build_model, save_model


def train_by_hand(base_model: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter whose B matrices were moved."""
    model = attach_adapter(load_model(base_model), TrainingConfig(rank=4, alpha=8, **settings), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, matrix in collect_trained(model).items():
            if ".lora_B." in name:
                matrix.normal_(0, 0.1)
    return save_adapter(model, folder)


def write_merged(base_model: Path, adapter: Path, folder: Path) -> tuple[Path, Any]:
    """Write the merged weights and the config; return the folder and the plan."""
    plan = plan_merge(base_model, adapter)
    folder.mkdir()
    write_shards(plan, folder, 10**9)
    (folder / "config.json").write_bytes((base_model / "config.json").read_bytes())
    return folder, plan


@pytest.mark.parametrize(
    ("case", "num_changed"),
    [
        # 2 layers x 4 attention matrices, and 4 experts x 3 projections stored one by one.
        ("mixtral", 2 * (4 + 12)),
        # Attention of 5 matrices, layer 0 dense, layer 1 of 4 experts and a shared one.
        ("deepseek_v3", 2 * 5 + 3 + 12 + 3),
        # Experts stored as the stacks [E, in, out] that the model holds, biases beside them.
        ("gpt_oss", 2 * (4 + 2)),
        # Stacks [E, in, out], adapted by another order of dimensions.
        ("llama4", 2 * 4 + 3 + 2 + 3),
        # Stacks that are stored the other way round than the model holds them.
        ("qwen3_vl_moe", 2 * (4 + 2)),
        ("granitemoe", 2 * (4 + 2)),
        # A composite whose stored names are other ones than the model's.
        ("llava", 2 * 7),
        ("qwen3_5_moe", 5 + 4 + 2 * (12 + 3)),
        # Weights [in, out].
        ("gpt2", 2 * 4),
        # Several weights in one stored tensor, one after the other: gate, queries, keys and values, of two stacks.
        ("hrm_text", 2 * 2 * 4),
        # Of uneven sizes.
        ("molmo2", 2 * 4),
        # Their rows in turn, of all experts and of a dense layer.
        ("inkling_mm_model", 18),
        # One list of experts, the first half of them for text, the others for images.
        ("ernie4_5_vl_moe", 2 * 4 + 3 + 2 * 3 + 3 * 3),
    ],
)
def test_merge_is_pefts_and_touches_nothing_else(case: str, num_changed: int, tmp_path: Path) -> None:
    base_model = save_model(case, tmp_path / "base")
    adapter = train_by_hand(base_model, tmp_path / "adapter")
    folder, plan = write_merged(base_model, adapter, tmp_path / "merged")
    before, after = load_file(base_model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) == num_changed
    written = verify_tensors(plan, folder)
    assert (written.num_changed, written.num_kept, written.unmoved) == (num_changed, len(before) - num_changed, ())
    # The oracle: PEFT merges the whole model in memory.
    merged: Any = PeftModel.from_pretrained(load_model(base_model), str(adapter)).merge_and_unload(safe_merge=True)
    for name, tensor in load_model(folder).state_dict().items():
        assert (tensor - merged.state_dict()[name]).abs().max() < 1e-5, name


def test_every_dtype_of_a_mixed_checkpoint_stays(tmp_path: Path) -> None:
    base_model = save_model("qwen3_5_moe", tmp_path / "base")
    tensors = load_file(base_model / "model.safetensors")
    wide = {name for name in tensors if name.endswith(("A_log", "linear_attn.norm.weight"))}
    assert len(wide) == 2
    mixed = {name: tensor if name in wide else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(mixed, base_model / "model.safetensors", metadata={"format": "pt"})
    adapter = train_by_hand(base_model, tmp_path / "adapter")
    folder, plan = write_merged(base_model, adapter, tmp_path / "merged")
    after = load_file(folder / "model.safetensors")
    assert {name for name, tensor in after.items() if tensor.dtype == torch.float32} == wide
    assert verify_tensors(plan, folder).unmoved == ()


def test_attention_alone_leaves_the_experts(tmp_path: Path) -> None:
    base_model = save_model("qwen3_moe", tmp_path / "base")
    adapter = train_by_hand(base_model, tmp_path / "adapter", target_modules=("q_proj", "o_proj"), use_dora=True)
    folder, plan = write_merged(base_model, adapter, tmp_path / "merged")
    assert verify_tensors(plan, folder).num_changed == 2 * 2


def test_what_is_damaged_or_unmoved_is_named(tmp_path: Path) -> None:
    base_model = save_model("qwen3_moe", tmp_path / "base")
    adapter = train_by_hand(base_model, tmp_path / "adapter")
    folder, plan = write_merged(base_model, adapter, tmp_path / "merged")
    base, merged = load_file(base_model / "model.safetensors"), load_file(folder / "model.safetensors")

    def write(**changes: torch.Tensor) -> None:
        save_file({**merged, **changes}, folder / "model.safetensors", metadata={"format": "pt"})

    router, expert = "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.3.up_proj.weight"
    write(**{router: merged[router] + 1e-3})
    with pytest.raises(MergeError, match=r"1 untrained tensor differs.*mlp.gate.weight"):
        verify_tensors(plan, folder)
    write(**{expert: merged[expert].bfloat16()})
    with pytest.raises(MergeError, match=r"experts.3.up_proj.weight is BF16 \[24, 32\], but the base model's is F32"):
        verify_tensors(plan, folder)
    write(spare=torch.ones(1))
    with pytest.raises(MergeError, match=r"1 tensor is not those of the base model, such as spare"):
        verify_tensors(plan, folder)
    write(**{expert: base[expert]})
    assert describe_unmoved(verify_tensors(plan, folder)).startswith(
        "1 of 32 trained weights are still the base model's after merging, such as model.layers.1.mlp.experts.3.up_proj"
    )


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path) -> None:
    base_model = save_model("qwen3_moe", tmp_path / "base")
    adapter = train_by_hand(base_model, tmp_path / "adapter")
    config = build_model("qwen3_moe").config
    config.num_experts = 2
    type(build_model("qwen3_moe"))(config).save_pretrained(tmp_path / "other")
    with pytest.raises(MergeError, match="this adapter was trained on another base model"):
        plan_merge(tmp_path / "other", adapter)


def test_rows_of_a_stored_tensor_that_belong_to_others_stay(tmp_path: Path) -> None:
    """Values in the place of one weight, and DoRA's lengths of its rows."""
    base_model = save_model("hrm_text", tmp_path / "base")
    name = "model.L_module.layers.0.attn.gqkv_proj.weight"
    before, first = load_file(base_model / "model.safetensors"), load_model(base_model)
    for number in range(2):
        folder = tmp_path / str(number)
        if not number:
            changed = {"model.L_module.layers.0.self_attn.k_proj.weight": torch.ones(32, 32)}
            folder.mkdir()
            save_file(changed, folder / TRAINED_WEIGHTS)
            (folder / TRAINED_CONFIG).write_text(json.dumps({"method": "full", "base_model_name_or_path": ""}))
        else:
            train_by_hand(base_model, folder, use_dora=True, target_modules=("k_proj",))
        merged, plan = write_merged(base_model, folder, tmp_path / f"merged-{number}")
        after = load_file(merged / "model.safetensors")
        moved = (after[name] != before[name]).any(1)
        assert moved.tolist() == [False] * 64 + [True] * 32 + [False] * 32
        verify_tensors(plan, merged)
        loaded, part = load_model(merged).state_dict(), "model.L_module.layers.0.self_attn.{}_proj.weight"
        assert torch.equal(loaded[part.format("v")], first.state_dict()[part.format("v")])
        if number:
            merged_by_peft: Any = PeftModel.from_pretrained(first, str(folder)).merge_and_unload(safe_merge=True)
            assert (loaded[part.format("k")] - merged_by_peft.state_dict()[part.format("k")]).abs().max() < 1e-5
        else:
            assert bool((loaded[part.format("k")] == 1).all())


def test_a_weight_that_was_turned_when_it_was_stored_is_refused() -> None:
    """Rows of queries and keys in another order than the model's."""
    rule = WeightConverter(
        "in_proj.weight",
        ["q_proj.weight", "k_proj.weight"],
        [Chunk(dim=0), PermuteForRope(permute_layer_names=["q_proj", "k_proj"])],
    )
    stored = StoredTensor(Path("file"), "0.in_proj.weight", "F32", (8, 4), 0, 128)
    change = LowRank(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    with pytest.raises(MergeError, match=r"0\.q_proj\.weight: 0\.in_proj\.weight in the files holds it together with"):
        divide_change("0.q_proj.weight", change, Sources(rule, {"in_proj.weight": [stored]}))
