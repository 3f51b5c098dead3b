import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.storage import digest_folder
from tasks.training.lora import attach_adapter, collect_trained, save_adapter
from tasks.training.records import TrainingError
from tests.tasks.training.conftest import SHAPE, build_model


def test_all_linear_leaves_the_head_and_the_embedding_out(base_model: Path) -> None:
    model = attach_adapter(load_model(base_model), TrainingConfig(rank=4), seed=0)
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in collect_trained(model)}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_same_adapter_has_the_same_bytes_in_every_process(base_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from schemas.config import TrainingConfig;"
        "from tasks.models import load_model;"
        "from tasks.training.lora import attach_adapter, save_adapter; source, target = map(Path, sys.argv[1:]);"
        "save_adapter(attach_adapter(load_model(source), TrainingConfig(rank=2), seed=0), target)"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # of the order of sets: another than here
    command = [sys.executable, "-c", code, str(base_model), str(tmp_path / "there")]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True)
    save_adapter(attach_adapter(load_model(base_model), TrainingConfig(rank=2), seed=0), tmp_path / "here")
    assert digest_folder(tmp_path / "there") == digest_folder(tmp_path / "here")


def test_fresh_adapter_changes_nothing_and_is_drawn_from_the_seed(base_model: Path) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    models = [attach_adapter(load_model(base_model), TrainingConfig(rank=4), seed=seed).eval() for seed in (1, 1, 2)]
    with torch.no_grad():
        plain = load_model(base_model)(input_ids=ids).logits
        assert all(torch.equal(model(input_ids=ids).logits, plain) for model in models)
    first, again, other = ({name: p.detach() for name, p in collect_trained(model).items()} for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_drawing_an_adapter_leaves_the_random_state_alone(base_model: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    attach_adapter(load_model(base_model), TrainingConfig(rank=4), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapter_over_a_bf16_base_is_fp32(tmp_path: Path) -> None:
    model = load_model(build_model(tmp_path, dtype=torch.bfloat16))
    adapted = attach_adapter(model, TrainingConfig(rank=4, modules_to_save=("embed_tokens",)), seed=0)
    assert {parameter.dtype for parameter in adapted.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in adapted.parameters() if not parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 16 / 4), ({"use_rslora": True}, 16 / 2), ({"use_dora": True}, 16 / 4)]
)
def test_scale(base_model: Path, changes: dict[str, bool], scale: float) -> None:
    config = TrainingConfig.model_validate({"rank": 4, "alpha": 16, "target_modules": ("q_proj",), **changes})
    model: Any = attach_adapter(load_model(base_model), config, seed=0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scale
    assert bool(layer.lora_magnitude_vector) == ("use_dora" in changes)


def test_unknown_modules_are_named_with_those_that_exist(base_model: Path) -> None:
    with pytest.raises(TrainingError, match=r"target_modules names 'query'.*choose from .*k_proj.*q_proj.*all-linear"):
        attach_adapter(load_model(base_model), TrainingConfig(target_modules=("q_proj", "query")), seed=0)
    with pytest.raises(TrainingError, match=r"modules_to_save names 'emb'.*choose from .*embed_tokens"):
        attach_adapter(load_model(base_model), TrainingConfig(modules_to_save=("emb",)), seed=0)


def test_tied_embedding_is_trained_as_one_tensor_with_the_head(base_model: Path, tmp_path: Path) -> None:
    config = TrainingConfig(rank=4, modules_to_save=("embed_tokens",))
    model = attach_adapter(load_model(base_model), config, seed=0)
    assert sum("modules_to_save" in name for name in collect_trained(model)) == 1
    saved = load_file(save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors")
    ends = [tensor for name, tensor in saved.items() if "lora_" not in name]
    assert len(ends) == 2
    assert torch.equal(*ends)


def test_a_composite_is_adapted_in_its_text_decoder_alone(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **SHAPE},
        vision_config={"model_type": "pixtral", **vision, "head_dim": 8, "image_size": 28, "patch_size": 14},
    )
    Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = attach_adapter(load_model(tmp_path), TrainingConfig(rank=4), seed=0)
    places = {name.split(".lora_")[0].rsplit(".", 3)[0] for name in collect_trained(model)}
    assert places == {"base_model.model.model.language_model.layers"}
    assert len(collect_trained(model)) == 2 * 7 * 2  # two layers of seven linear weights, A and B
