"""What a training did not move is named, experts one by one."""

import torch

from schemas.config import TrainingConfig
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.movement import find_unmoved, take_fingerprints
from tests.tasks.families.tiny import build_model


def test_what_did_not_move_is_named() -> None:
    model = attach_adapter(build_model("mixtral"), TrainingConfig(rank=4), seed=0)
    trained = collect_trained(model)
    start = take_fingerprints(model, trained)
    # 2 layers of 4 attention matrices and 2 stacks of experts, A and B.
    assert len(start) == 2 * 6 * 2
    assert sorted({len(value) for value in start.values()}) == [1, 4]
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.01)
    assert find_unmoved(start, take_fingerprints(model, trained), num_steps=2) == []

    k_proj = trained["base_model.model.model.layers.1.self_attn.k_proj.lora_A.default.weight"]
    experts = trained["base_model.model.model.layers.0.mlp.experts.lora_B.default.weight"]
    with torch.no_grad():
        k_proj.sub_(0.01)
        # B [out, r E]: every fourth column is of one expert, which is put back to its start, zero.
        experts.view(experts.shape[0], 4, 4)[:, :, 2] = 0.0
    start["base_model.model.model.layers.1.self_attn.k_proj.lora_A.default.weight"] = take_fingerprints(
        model, {"lora_A.": k_proj}
    )["lora_A."]
    said = find_unmoved(start, take_fingerprints(model, trained), num_steps=2)
    assert [sentence.partition(":")[0] for sentence in said] == [
        "1 of 24 trained tensors did not move, such as model.layers.1.self_attn.k_proj.lora_A",
        "1 of 4 experts' matrices in 1 weights did not move, such as 1 of 4 in model.layers.0.mlp.experts.lora_B",
    ]
    # After a single step B alone has moved.
    assert len(find_unmoved(start, take_fingerprints(model, trained), num_steps=1)) == 1
