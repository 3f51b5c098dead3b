"""A model whose own weights were trained is written with these, and else as the base is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.config import MergeConfig, TrainingConfig
from tasks.merging.changes import MergeError
from tasks.merging.parity import ParityError, check_merge
from tasks.merging.verification import verify_tensors
from tasks.merging.weights import merge_adapter
from tasks.models import load_model
from tasks.training.loop import train_adapter
from tests.tasks.training.conftest import build_model, build_tokenizer, write_tokens
from tests.tasks.training.test_own_weights import FREEZE, FULL


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Alone in a folder, as the tokenization leaves it."""
    return build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [FULL, FREEZE], ids=["full", "freeze"])
def test_written_model_is_the_trained_one_and_else_the_base(
    tmp_path: Path, tokenizer: Path, config: TrainingConfig, dtype: torch.dtype
) -> None:
    base_model = build_model(tmp_path / "model", vocab_size=120, dtype=dtype)
    tokens = write_tokens(tmp_path / "tokens", num_train=44)
    trained = train_adapter(base_model, tokens, tmp_path / "run", config, seed=5, identity="x").adapter
    plan = merge_adapter(base_model, trained, tokenizer, tmp_path / "written", max_shard_size="20KB")
    check = check_merge(base_model, trained, tmp_path / "written", [[5, 6, 7], [8, 9]], MergeConfig(probe_tokens=8))
    assert check.differs_from_base
    assert check.greedy_agreement == 1.0 if dtype == torch.float32 else check.greedy_agreement >= 0.95
    assert check.max_abs_logit_diff <= (1e-5 if dtype == torch.float32 else 0.5)

    written = verify_tensors(plan, tmp_path / "written")
    model = load_model(base_model)
    names = {name for name, _ in model.named_parameters()}
    expected = names if config.method == "full" else {name for name in names if ".layers.1." in name}
    assert not written.unmoved
    assert written.num_changed == len(expected)
    assert written.num_kept == len(names) - len(expected)
    again, base = load_model(tmp_path / "written").state_dict(), model.state_dict()
    values = load_file(trained / "trained_weights.safetensors")
    for name in names:
        assert torch.equal(again[name], values[name].to(dtype) if name in expected else base[name])
    card = (tmp_path / "written" / "README.md").read_text(encoding="utf-8")
    assert f"| method | `{config.method}` |" in card
    assert "LoRA" not in card


def test_written_model_that_is_the_base_or_another_one_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    base_model = build_model(tmp_path / "model", vocab_size=120)
    tokens = write_tokens(tmp_path / "tokens", num_train=44)
    trained = train_adapter(base_model, tokens, tmp_path / "run", FULL, seed=5, identity="x").adapter
    with pytest.raises(ParityError, match=r"difference from the trained model .*as near to the base model as to the"):
        check_merge(base_model, trained, base_model, [[5, 6, 7]], MergeConfig(probe_tokens=4))
    plan = merge_adapter(base_model, trained, tokenizer, tmp_path / "written", max_shard_size="5GB")
    file = tmp_path / "written" / "model.safetensors"
    freeze = train_adapter(base_model, tokens, tmp_path / "freeze", FREEZE, seed=5, identity="x").adapter
    plan_of_freeze = merge_adapter(base_model, freeze, tokenizer, tmp_path / "other", max_shard_size="5GB")
    with pytest.raises(MergeError, match=r"untrained tensors? differs? from the base model's, such as model\.embed"):
        verify_tensors(plan_of_freeze, file.parent)
    values = load_file(file)
    values.pop("model.norm.weight")
    save_file(values, file, metadata={"format": "pt"})
    with pytest.raises(MergeError, match="1 tensor"):
        verify_tensors(plan, file.parent)


def test_weights_of_another_model_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    base_model = build_model(tmp_path / "model", vocab_size=120)
    other = build_model(tmp_path / "other", vocab_size=120, hidden_size=48)
    tokens = write_tokens(tmp_path / "tokens", num_train=8)
    config = FULL.model_copy(update={"max_steps": 1})
    trained = train_adapter(base_model, tokens, tmp_path / "run", config, seed=5, identity="x").adapter
    with pytest.raises(MergeError, match=r"model.embed_tokens.weight \[120, 32\] is \[120, 48\] in this Qwen3"):
        merge_adapter(other, trained, tokenizer, tmp_path / "merged", max_shard_size="5GB")
    values = load_file(trained / "trained_weights.safetensors")
    save_file({**values, "model.norm.weight": torch.full((32,), float("nan"))}, trained / "trained_weights.safetensors")
    with pytest.raises(MergeError, match="NaN or infinity in 1 tensor"):
        merge_adapter(base_model, trained, tokenizer, tmp_path / "merged2", max_shard_size="5GB")


def test_tied_checkpoint_that_holds_both_tensors_gets_both(tmp_path: Path, tokenizer: Path) -> None:
    base_model = build_model(tmp_path / "model", vocab_size=120)
    file = base_model / "model.safetensors"
    values = load_file(file)
    assert "lm_head.weight" not in values
    values["lm_head.weight"] = values["model.embed_tokens.weight"].clone()
    save_file(values, file, metadata={"format": "pt"})
    tokens = write_tokens(tmp_path / "tokens", num_train=12)
    trained = train_adapter(base_model, tokens, tmp_path / "run", FULL, seed=5, identity="x").adapter
    merge_adapter(base_model, trained, tokenizer, tmp_path / "written", max_shard_size="5GB")
    written = load_file(tmp_path / "written" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], values["lm_head.weight"])
