import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Mistral3Config, Mistral3ForConditionalGeneration

from schemas.config import TrainingConfig
from tasks.merging.changes import MergeError
from tasks.merging.weights import merge_adapter, parse_size
from tasks.models import load_model
from tasks.training.lora import attach_adapter, collect_trained, save_adapter
from tests.tasks.merging.conftest import SHAPE, build_adapter, build_base, load


def merge(base_model: Path, adapter: Path, tokenizer: Path, folder: Path, size: str = "5GB") -> Path:
    merge_adapter(base_model, adapter, tokenizer, folder, max_shard_size=size, card={"base_model": "tiny/base"})
    return folder


def merge_with_peft(base_model: Path, adapter: Path) -> dict[str, torch.Tensor]:
    merged: Any = PeftModel.from_pretrained(load(base_model), str(adapter)).merge_and_unload(safe_merge=True)
    return dict(merged.state_dict())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
    ids=["lora", "rslora", "two modules", "embedding", "dora", "rank pattern", "adapted embedding"],
)
def test_merge_is_pefts_own_in_fp32(tmp_path: Path, tokenizer: Path, tied: bool, settings: dict[str, Any]) -> None:
    base_model = build_base(tmp_path / "base", tied=tied)
    adapter = build_adapter(base_model, tmp_path / "adapter", **settings)
    merged = load(merge(base_model, adapter, tokenizer, tmp_path / "merged")).state_dict()
    expected = merge_with_peft(base_model, adapter)
    base = load(base_model).state_dict()
    assert merged.keys() == expected.keys() == base.keys()
    for name, tensor in expected.items():
        assert (merged[name] - tensor).abs().max() <= 1e-6, name
    assert any((merged[name] - base[name]).abs().max() > 0.01 for name in base)


def test_by_hand(base_model: Path, adapter: Path, tokenizer: Path, tmp_path: Path) -> None:
    merged = load_file(merge(base_model, adapter, tokenizer, tmp_path / "merged") / "model.safetensors")
    base = load_file(base_model / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    path = "model.layers.1.self_attn.k_proj"
    a, b = (parts[f"base_model.model.{path}.lora_{letter}.weight"] for letter in "AB")
    assert (a.shape, b.shape) == ((4, 32), (16, 4))
    assert torch.equal(merged[f"{path}.weight"], base[f"{path}.weight"] + 2.0 * (b @ a))
    assert merged.keys() == base.keys()
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(merged[name], base[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base_is_rounded_once(tmp_path: Path, tokenizer: Path, dtype: torch.dtype) -> None:
    base_model = build_base(tmp_path / "base", dtype=dtype)
    adapter = build_adapter(base_model, tmp_path / "adapter")
    merged = load_file(merge(base_model, adapter, tokenizer, tmp_path / "merged") / "model.safetensors")
    expected = merge_with_peft(base_model, adapter)  # in fp32
    assert {tensor.dtype for tensor in merged.values()} == {dtype}
    half_a_step = torch.finfo(dtype).eps / 2
    for name, tensor in merged.items():
        assert ((tensor.float() - expected[name]).abs() <= half_a_step * expected[name].abs() + 1e-6).all(), name


def test_shards(tmp_path: Path, base_model: Path, adapter: Path, tokenizer: Path) -> None:
    many = merge(base_model, adapter, tokenizer, tmp_path / "many", "20KB")
    one = merge(base_model, adapter, tokenizer, tmp_path / "one")
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) >= 4
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(one / "model.safetensors").values())
    for name, file in index["weight_map"].items():
        with safe_open(many / file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            assert sum(reader.get_tensor(key).nbytes for key in reader.keys()) <= 20_000  # noqa: SIM118
            assert name in reader.keys()  # noqa: SIM118
    assert not (one / "model.safetensors.index.json").exists()
    same = load(one).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in load(many).state_dict().items())


def test_sharded_base(tmp_path: Path, base_model: Path, adapter: Path, tokenizer: Path) -> None:
    sharded = build_base(tmp_path / "base", shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    merged = load_file(merge(sharded, adapter, tokenizer, tmp_path / "a") / "model.safetensors")
    expected = load_file(merge(base_model, adapter, tokenizer, tmp_path / "b") / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_tied_stays_tied(tmp_path: Path, base_model: Path, tokenizer: Path) -> None:
    adapter = build_adapter(
        base_model, tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    folder = merge(base_model, adapter, tokenizer, tmp_path / "merged")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    model = load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_head_trained_apart_from_its_tied_embedding_gets_a_tensor_of_its_own(
    tmp_path: Path, base_model: Path, tokenizer: Path
) -> None:
    adapter = build_adapter(base_model, tmp_path / "adapter", target_modules=["lm_head"])
    folder = merge(base_model, adapter, tokenizer, tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(load(base_model), str(adapter))(input_ids=ids).logits
        assert torch.allclose(load(folder)(input_ids=ids).logits, adapted, atol=1e-5)


def test_companions(tmp_path: Path, base_model: Path, adapter: Path, tokenizer: Path) -> None:
    folder = merge(base_model, adapter, tokenizer, tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text()) == json.loads((base_model / "config.json").read_text())
    shipped, own = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tokenizer)
    turn = [{"role": "user", "content": "hello"}]
    ids = own.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert shipped.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) == ids
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [95, 1]  # the template's end of turn, then eos
    assert generation.pad_token_id == 0
    card = (folder / "README.md").read_text()
    assert 'base_model: "tiny/base"' in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_base_generation_config_is_kept(tmp_path: Path, adapter: Path, tokenizer: Path) -> None:
    base_model = build_base(tmp_path / "base")
    values = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 90]}
    (base_model / "generation_config.json").write_text(json.dumps(values))
    folder = merge(base_model, adapter, tokenizer, tmp_path / "merged")
    expected = {"do_sample": True, "temperature": 0.6, "eos_token_id": [95, 1, 90], "pad_token_id": 0}
    assert json.loads((folder / "generation_config.json").read_text()) == expected


def test_a_merged_model_names_no_code_that_is_not_there(tmp_path: Path, adapter: Path, tokenizer: Path) -> None:
    """Whoever loads it with trust_remote_code would otherwise be told of a missing file."""
    base_model = build_base(tmp_path / "base")
    config = json.loads((base_model / "config.json").read_text())
    asking = {**config, "auto_map": {"AutoModelForCausalLM": "modeling_x.Model"}}
    (base_model / "config.json").write_text(json.dumps(asking))
    folder = merge(base_model, adapter, tokenizer, tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text()) == config


def test_nan_is_refused(tmp_path: Path, base_model: Path, adapter: Path, tokenizer: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(MergeError, match=r"NaN or infinity in 1 tensor.*train again"):
        merge(base_model, broken, tokenizer, tmp_path / "merged")


def test_overflow_of_the_stored_dtype_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    base_model = build_base(tmp_path / "base", dtype=torch.float16)
    adapter = build_adapter(base_model, tmp_path / "adapter", strength=1e5)
    with pytest.raises(MergeError, match=r"_proj.weight: NaN or infinity after merging into torch.float16"):
        merge(base_model, adapter, tokenizer, tmp_path / "merged")


def test_adapter_of_another_base_is_refused(tmp_path: Path, tokenizer: Path, adapter: Path) -> None:
    base_model = build_base(tmp_path / "base")
    tensors = load_file(base_model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:40].clone()
    save_file(tensors, base_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match=r"up_proj.weight: the adapter's shape is \[48, 32\], but .* is \[40, 32\]"):
        merge(base_model, adapter, tokenizer, tmp_path / "merged")


def test_what_is_not_there_is_named(tmp_path: Path, base_model: Path, adapter: Path, tokenizer: Path) -> None:
    with pytest.raises(MergeError, match=r"neither model\.safetensors nor"):
        merge(tmp_path, adapter, tokenizer, tmp_path / "merged")
    with pytest.raises(MergeError, match=r"adapter_config.json: cannot be read"):
        merge(base_model, tmp_path / "none", tokenizer, tmp_path / "a")
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    with pytest.raises(MergeError, match="is not empty"):
        merge(base_model, adapter, tokenizer, full)


@pytest.mark.parametrize(("text", "size"), [("500MB", 500_000_000), ("1.5GB", 1_500_000_000), ("20KB", 20_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "5 GB", "0MB", "5TB", "-1GB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(MergeError, match=r"merge\.max_shard_size"):
        parse_size(text)


def test_a_composite_is_written_whole_again(tmp_path: Path, tokenizer: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Mistral3Config(
        text_config={"model_type": "mistral", **SHAPE},
        vision_config={"model_type": "pixtral", **vision, "head_dim": 8, "image_size": 28, "patch_size": 14},
    )
    base_model = tmp_path / "base"
    Mistral3ForConditionalGeneration(config).save_pretrained(base_model)
    (base_model / "preprocessor_config.json").write_text('{"size": 28}')
    tuned = attach_adapter(load_model(base_model), TrainingConfig(rank=4), seed=0)
    with torch.no_grad():
        for name, parameter in collect_trained(tuned).items():
            if "lora_B" in name:
                parameter.add_(0.3)
    adapter = save_adapter(tuned, tmp_path / "adapter")
    folder = merge(base_model, adapter, tokenizer, tmp_path / "merged")
    before, after = load_file(base_model / "model.safetensors"), load_file(folder / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert len(changed) == 14
    assert all("language_model" in name and "proj" in name for name in changed)
    assert (folder / "preprocessor_config.json").read_text() == '{"size": 28}'
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(load_model(folder)(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=1e-4)
