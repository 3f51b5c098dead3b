"""What is counted without values is what the training holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.config import TrainingConfig
from tasks.decoder.passing_copies import pass_copies
from tasks.decoder.recognition import recognize_decoder
from tasks.models import load_model
from tasks.planning.memory import count_flop, count_need, find_longest, fits, list_options, needs_host
from tasks.training.lora import collect_trained
from tasks.training.methods import attach_trained
from tasks.training.own_weights import choose_weights
from tasks.training.records import TrainingError
from tasks.training.throughput import count_useful_flop

MODEL = Path(__file__).parents[3] / "deploy" / "demo" / "base_model"
CONFIGS = [
    TrainingConfig(rank=8),
    TrainingConfig(rank=4, target_modules=("q_proj", "down_proj")),
    TrainingConfig(method="full"),
    TrainingConfig(method="freeze", trained_layers=1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.method} {config.target_modules[0]}")
def test_weights_and_optimizer_are_counted_to_the_byte(config: TrainingConfig) -> None:
    model = attach_trained(load_model(MODEL, dtype=torch.float32), config, seed=0)
    trained = collect_trained(model)
    frozen = {id(p): p for name, p in model.named_parameters() if name not in trained}
    need = count_need(MODEL, config, dtype=torch.float32, longest=100)
    assert need.num_trained == sum(parameter.numel() for parameter in trained.values())
    assert need.trained_bytes == 16 * need.num_trained
    assert need.weights_bytes == sum(4 * parameter.numel() for parameter in frozen.values())
    assert count_flop(MODEL, config) == count_useful_flop(model)


def test_what_would_make_it_fit_does_fit_and_the_config_itself_does_not() -> None:
    config = TrainingConfig(method="full", micro_batch=8)
    whole: dict[str, Any] = {"dtype": torch.float32, "longest": 64}
    need = count_need(MODEL, config, **whole)
    assert list_options(MODEL, config, capacity_bytes=2 * need.least_bytes, **whole) == ()
    capacity = int(0.8 * need.least_bytes / 0.9)
    assert not fits(need, capacity)
    options = list_options(MODEL, config, capacity_bytes=capacity, **whole)
    assert "training.optimizer adamw_8bit" in [option.settings for option in options]
    assert all(option.least_bytes <= 0.9 * capacity for option in options)
    assert list_options(MODEL, config, capacity_bytes=1000, **whole) == ()


def test_experts_in_8_bits_are_counted_to_the_byte(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 24, "num_hidden_layers": 2,
        "num_experts": 6, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "vocab_size": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    AutoConfig.for_model("qwen3_moe", **shape).save_pretrained(tmp_path)
    whole: dict[str, Any] = {"dtype": torch.bfloat16, "longest": 10}
    full = count_need(tmp_path, TrainingConfig(), **whole)
    need = count_need(tmp_path, TrainingConfig(base_weights="fp8"), **whole)
    experts, rows = 2 * 6 * 3 * 24 * 64, 2 * 6 * (64 + 64)  # a row's scale: of gate_up [48, 64] at most 64, of down 64
    # Queries and outputs [64, 64], keys and values [32, 64]: a byte each way, and a scale for each row and column.
    scales = 2 * 2 * ((64 + 64) + (32 + 64))
    assert full.weights_bytes - need.weights_bytes == experts - 4 * rows - 4 * scales
    assert full.loaded_bytes == 0
    assert need.loaded_bytes == full.weights_bytes + 4 * need.num_trained
    assert need.least_pass_bytes == full.least_pass_bytes + 6 * 48 * 64
    packed = count_need(tmp_path, TrainingConfig(base_weights="nf4"), **whole)
    attention = 2 * 2 * (64 * 64 + 32 * 64)
    assert full.weights_bytes - packed.weights_bytes == pytest.approx(attention * (2 - 0.515875), abs=1)


def test_copies_of_all_layers_but_two_are_not_among_the_least(tmp_path: Path) -> None:
    """What the training holds with copies of two layers at a time is counted to the byte."""
    AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96,
    ).save_pretrained(tmp_path)  # fmt: skip
    config = TrainingConfig(method="full")
    need = count_need(tmp_path, config, dtype=torch.bfloat16, longest=10)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert need.passing_bytes == 2 * 3 * layer
    assert need.least_bytes == need.fixed_bytes - need.passing_bytes + need.least_pass_bytes
    assert count_need(tmp_path, config, dtype=torch.float32, longest=10).passing_bytes == 0
    general = config.model_copy(update={"engine": "general"})
    assert count_need(tmp_path, general, dtype=torch.bfloat16, longest=10).passing_bytes == 0
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    decoder = recognize_decoder(choose_weights(model, config, dtype=torch.bfloat16), torch.bfloat16)
    assert decoder.weights is not None
    before = sum(copy.target.numel() for copy in decoder.weights.copies)
    passing = pass_copies(decoder)
    assert passing is not None
    assert 2 * (before - sum(copy.target.numel() for copy in decoder.weights.copies)) == 2 * 5 * layer
    # Each matrix in a slot begins at a multiple of 256 bytes.
    assert 0 <= passing.held_bytes - 2 * 2 * layer < 2 * 4 * 256


def test_where_the_layers_are_divided_their_share_and_two_of_them_are_counted() -> None:
    model: Any = load_model(MODEL, dtype=torch.float32)
    whole: dict[str, Any] = {"dtype": torch.float32, "longest": 100}
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers]
    one, four = (TrainingConfig(num_processes=n, micro_batch=4, strategy="fsdp") for n in (1, 4))
    assert count_need(MODEL, one, **whole).weights_bytes == 4 * total
    expected = 4 * (total - sum(layers)) + sum(layers) + 2 * 4 * max(layers)
    need = count_need(MODEL, four, **whole)
    assert need.weights_bytes == pytest.approx(expected, abs=8)
    assert need.trained_bytes == count_need(MODEL, one, **whole).trained_bytes
    general = four.model_copy(update={"engine": "general"})
    assert count_need(MODEL, general, **whole).weights_bytes == total


def test_devices_that_share_examples_hold_the_whole_model_and_their_part_of_the_tokens() -> None:
    whole: dict[str, Any] = {"dtype": torch.float32, "longest": 512}
    config = TrainingConfig(micro_batch=1)
    alone = count_need(MODEL, config, **whole)
    both = count_need(MODEL, TrainingConfig(micro_batch=1, num_processes=2, context_parallel=2), **whole)
    assert (both.weights_bytes, both.trained_bytes) == (alone.weights_bytes, alone.trained_bytes)
    assert both.least_pass_bytes == alone.least_pass_bytes / 2 == 256 * (4 * 256 + 2048) * 4
    capacity = int((both.least_bytes + alone.least_bytes) / 2 / 0.9)
    options = list_options(MODEL, config, capacity_bytes=capacity, **whole)
    assert "training.num_processes 2, training.context_parallel 2" in [option.settings for option in options]


def test_heads_that_cannot_be_divided_are_refused_before_anything_is_loaded() -> None:
    config = TrainingConfig(micro_batch=1, num_processes=3, context_parallel=3)
    with pytest.raises(TrainingError, match=r"8 heads with 2 of keys cannot be divided among 3 processes"):
        count_need(MODEL, config, dtype=torch.float32, longest=512)


def make_deep(folder: Path) -> Path:
    """32 layers of 64 columns: a layer's input of a token takes 128 bytes in 16 bits, all of them 4,096."""
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 1 << 21,
    }  # fmt: skip
    AutoConfig.for_model("llama", **shape).save_pretrained(folder)
    return folder


def test_layers_inputs_that_the_host_takes_are_no_need_of_the_device(tmp_path: Path) -> None:
    folder, config = make_deep(tmp_path), TrainingConfig(micro_batch=1, precision="bf16")
    whole: dict[str, Any] = {"dtype": torch.bfloat16, "longest": 1 << 20}
    logits = 1 << 28
    alone = count_need(folder, config, **whole)
    assert alone.least_pass_bytes == (32 << 27) + logits
    assert (alone.host_bytes, alone.spared_bytes) == (0, 0)
    # 10 layers' inputs lie in the host's memory, and two of them are on their way.
    some = count_need(folder, config, host_bytes=10 << 27, **whole)
    assert (some.host_bytes, some.spared_bytes) == (10 << 27, 8 << 27)
    # All but the last layer's do, and a layer's work takes eight at least.
    most = count_need(folder, config, host_bytes=1 << 40, **whole)
    assert (most.host_bytes, most.spared_bytes) == (31 << 27, 24 << 27)
    assert most.least_bytes == alone.least_bytes - (24 << 27)
    # Two processes have half of the host each.
    two = config.model_copy(update={"num_processes": 2, "micro_batch": 2})
    assert count_need(folder, two, host_bytes=20 << 27, **whole).host_bytes == 10 << 27
    for update in ({"engine": "general"}, {"gradient_checkpointing": False}):
        other = count_need(folder, config.model_copy(update=update), host_bytes=1 << 40, **whole)
        assert (other.host_bytes, other.spared_bytes) == (0, 0)


def test_the_longest_example_that_fits_is_named(tmp_path: Path) -> None:
    folder, config = make_deep(tmp_path), TrainingConfig(micro_batch=1, precision="bf16")
    whole: dict[str, Any] = {"dtype": torch.bfloat16, "longest": 1 << 20}
    alone = count_need(folder, config, **whole)
    capacity = int((alone.least_bytes - (1 << 30)) / 0.9)
    assert not fits(alone, capacity)
    need = count_need(folder, config, host_bytes=31 << 27, **whole)
    assert needs_host(need, capacity)
    assert not needs_host(need, 2 * capacity)
    found = find_longest(folder, config, capacity_bytes=capacity, **whole)
    assert found == pytest.approx((1 << 20) * 0.75, rel=1e-3)  # a gibibyte less of four
    for tokens, is_enough in ((found, True), (found + 1, False)):
        assert fits(count_need(folder, config, dtype=torch.bfloat16, longest=tokens), capacity) == is_enough
    assert find_longest(folder, config, capacity_bytes=capacity, host_bytes=31 << 27, **whole) == 1 << 20
    assert find_longest(folder, config, capacity_bytes=1000, **whole) == 0
