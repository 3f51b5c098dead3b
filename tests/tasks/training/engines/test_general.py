"""The general engine against one example at a time through the model's own forward pass, family by family."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.decoder import elementwise
from tasks.models import load_model
from tasks.training.batches import form_batch
from tasks.training.engines.base_dropout import find_dropout, switch_off_dropout
from tasks.training.engines.chunked_head import compute_chunked_losses, is_head_frozen
from tasks.training.engines.flat_attention import NAME
from tasks.training.engines.flat_delta_net import find_delta_nets, use_flat_delta_nets
from tasks.training.engines.general import GeneralEngine, build_engine
from tasks.training.engines.loss import sum_token_losses
from tasks.training.engines.short_cuts import changes_with_length, take_short_cuts
from tasks.training.loop import train_adapter
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.micro_batches import form_padded_step
from tasks.training.objective import SFT
from tasks.training.records import StepRecord
from tasks.training.reference import fine_tune, learning_rate
from tasks.training.token_table import TokenTable
from tests.tasks.training.conftest import draw_examples, read_tokens, write_split, write_tokens
from tests.tasks.training.families import FAMILIES, FLAT, PADDED, build_family

CPU = torch.device("cpu")
Outcome = tuple[float, dict[str, Tensor]]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    folder = tmp_path_factory.mktemp("table")
    write_split(folder / "train.parquet", draw_examples(7, seed=7, shortest=3, longest=30))
    return read_tokens(folder / "train.parquet")[0]


def adapt(folder: Path, **training: Any) -> Any:
    """A model with an adapter that already does something, in training mode, without dropout of its own."""
    model = load_model(folder)
    switch_off_dropout(model)
    config = TrainingConfig(rank=4, alpha=8, **training)
    adapted = attach_adapter(model, config, seed=3)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in collect_trained(adapted).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.train()


def choose(
    model: Any, table: TokenTable, *, packing: bool = False, tokens: int = 64
) -> tuple[GeneralEngine, list[str]]:
    engine = build_engine(model, device=CPU, dtype=torch.float32, micro_batch=3, tokens_per_forward=tokens)
    return take_short_cuts(engine, table, packing=packing, place=CPU)


def differentiate(model: Any, losses: Iterator[Tensor]) -> Outcome:
    """Return the sum of the losses and its gradients."""
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    gradients = {}
    for name, parameter in collect_trained(model).items():
        if parameter.grad is not None:
            gradients[name], parameter.grad = parameter.grad, None
    return total, gradients


def one_by_one(model: Any, table: TokenTable) -> Outcome:
    rows = range(len(table.example_ids))
    return differentiate(model, (sum_token_losses(model, form_batch(table, [[row]])) for row in rows))


def through(engine: GeneralEngine, table: TokenTable, rows: list[list[int]] | None = None) -> Outcome:
    batches = engine.form_step(table, rows or [[row] for row in range(len(table.example_ids))])
    assert len(batches) > 1
    return differentiate(engine.model, (engine.sum_losses(batch) for batch in batches))


def assert_same(found: Outcome, wanted: Outcome) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * max(1.0, float(gradient.norm())), name
    assert max(float(gradient.norm()) for gradient in wanted[1].values()) > 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_loss_and_gradient_of_single_examples(
    tmp_path: Path, table: TokenTable, family: str
) -> None:
    model = adapt(build_family(tmp_path, family))
    wanted = one_by_one(model, table)
    engine, notes = choose(model, table)
    assert engine.has_chunked_head
    assert engine.is_head_whole
    if family in FLAT:
        assert engine.attend is not None
        assert notes == []
    else:
        assert engine.attend is None
        assert PADDED[family] in notes[0]
        assert model.get_base_model().config._attn_implementation != NAME
    assert_same(through(engine, table), wanted)
    # Chunks of the head, layers that run again, and both.
    assert_same(through(replace(engine, logits_bytes=1, num_recomputed=1), table), wanted)
    assert_same(through(replace(engine, num_recomputed=2), table), wanted)
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bloom"])
def test_packs_are_their_examples(tmp_path: Path, table: TokenTable, family: str) -> None:
    model = adapt(build_family(tmp_path, family))
    wanted = one_by_one(model, table)
    engine, notes = choose(model, table, packing=True)
    assert_same(through(engine, table, [[0, 1, 2], [3, 4], [5], [6]]), wanted)
    assert (family == "bloom") == any("does not keep packed examples apart" in note for note in notes)


def test_head_runs_on_no_more_rows_than_asked(tmp_path: Path, table: TokenTable) -> None:
    model = adapt(build_family(tmp_path, "llama"))
    base = model.get_base_model()
    rows: list[int] = []
    base.lm_head.register_forward_hook(lambda module, given, output: rows.append(output.shape[-2]))
    batch = form_batch(table, [[0], [1], [2], [3], [4], [5], [6]])
    loss = compute_chunked_losses(model, base, batch, is_frozen=True, ops=elementwise, logits_bytes=1).sum()
    assert sum(rows) == batch.num_trained_tokens
    assert max(rows) == 64 < batch.num_trained_tokens < batch.targets.numel()
    loss.backward()
    assert sum(rows) == batch.num_trained_tokens  # the frozen head does not run again


def test_gradient_in_16_bits_is_scaled_in_32(tmp_path: Path, table: TokenTable) -> None:
    """1 / 777 rounded to 16 bits is off by 0.1 %, in the same direction for every value."""
    model = adapt(build_family(tmp_path, "llama")).to(torch.bfloat16)
    base, batch = model.get_base_model(), form_batch(table, [[0], [1]])
    norms = []
    for divisor in (1.0, 777.0):
        loss = compute_chunked_losses(model, base, batch, is_frozen=True, ops=elementwise).sum()
        states = [p for name, p in collect_trained(model).items() if "layers.1.mlp.down_proj.lora_B" in name]
        (grad,) = torch.autograd.grad(loss / divisor, states)
        norms.append(float(grad.double().norm()))
    assert norms[0] / norms[1] == pytest.approx(777, rel=3e-4)


@pytest.mark.parametrize("modules", [("lm_head",), ("embed_tokens",)])
def test_trained_head_or_embedding_gets_its_gradient(
    tmp_path: Path, table: TokenTable, modules: tuple[str, ...]
) -> None:
    model = adapt(build_family(tmp_path, "llama", tie_word_embeddings=False), modules_to_save=modules)
    wanted = one_by_one(model, table)
    assert any(".modules_to_save." in name for name in wanted[1])
    engine, _ = choose(model, table)
    assert engine.is_head_whole == (modules == ("embed_tokens",))
    assert_same(through(replace(engine, logits_bytes=1), table), wanted)


def test_adapted_head_is_not_frozen(tmp_path: Path) -> None:
    model = adapt(build_family(tmp_path, "llama", tie_word_embeddings=False), target_modules=("lm_head", "q_proj"))
    assert not is_head_frozen(model.get_base_model())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_evaluation_is_the_mean_of_single_examples(tmp_path: Path, table: TokenTable, family: str) -> None:
    from tasks.training.validation import sum_held_out

    model = adapt(build_family(tmp_path, family))
    wanted = one_by_one(model, table)[0] / int((table.targets >= 0).sum())
    engine, _ = choose(model, table)
    loss_sum, num_trained = sum_held_out(model, engine, table, SFT)
    assert loss_sum / num_trained == pytest.approx(wanted, rel=1e-6)


def test_no_trained_position_gives_zero_not_nan(tmp_path: Path, table: TokenTable) -> None:
    model = adapt(build_family(tmp_path, "gemma2"))
    batch = form_batch(table, [[0], [1]])
    batch.targets.fill_(-100)
    for is_frozen in (True, False):
        loss = compute_chunked_losses(model, model.get_base_model(), batch, is_frozen=is_frozen, ops=elementwise).sum()
        loss.backward()
        assert loss.item() == 0.0


def test_window_that_a_short_trial_cannot_see_is_read_from_the_masks(tmp_path: Path, table: TokenTable) -> None:
    """Layers whose mask has a window that the attention is not told of keep their own attention."""
    model = adapt(build_family(tmp_path, "phi3", sliding_window=28))
    engine, notes = choose(model, table)
    assert engine.attend is not None
    assert notes == []

    model = adapt(build_family(tmp_path / "told", "gemma3_text", sliding_window=28))
    for layer in model.get_base_model().model.layers:
        layer.self_attn.sliding_window = None
    engine, notes = choose(model, table)
    assert engine.attend is None
    assert "its mask has a window of 28 and its attention one of None" in notes[0]


def test_chunked_attention_keeps_its_own(tmp_path: Path, table: TokenTable, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils
    from transformers.models.llama import modeling_llama

    model = adapt(build_family(tmp_path, "llama"))
    config = model.get_base_model().config
    config.attention_chunk_size = 28
    monkeypatch.setattr(modeling_llama, "create_causal_mask", masking_utils.create_chunked_causal_mask)
    engine, notes = choose(model, table)
    assert engine.attend is None
    assert "neither causal nor a sliding window" in notes[0]


def test_positions_that_depend_on_the_row_go_one_by_one(tmp_path: Path, table: TokenTable) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    model = adapt(build_family(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=16))
    config = model.get_base_model().config
    assert changes_with_length(config, 17)
    assert not changes_with_length(config, 16)
    wanted = one_by_one(model, table)
    engine, notes = choose(model, table, packing=True)
    assert "one example a pass" in notes[0]
    batches = engine.form_step(table, [[0, 1, 2], [3, 4], [5, 6]])
    assert [len(batch.example_ids) for batch in batches] == [1] * 7
    assert_same(through(engine, table, [[0, 1, 2], [3, 4], [5, 6]]), wanted)


def test_padding_is_among_rows_of_like_length(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", [(list(range(2, 90)) * 12, 5)] * 3 + [([5, 6, 7, 8], 1)] * 4)
    table, rows = read_tokens(tmp_path / "train.parquet")
    assert [batch.input_ids.shape for batch in form_padded_step(table, rows, 16)] == [(3, 1056), (4, 4)]
    assert [batch.input_ids.shape for batch in form_padded_step(table, rows, 16, 2200)] == [
        (2, 1056),
        (2, 1056),
        (3, 4),
    ]
    assert [len(batch.input_ids) for batch in form_padded_step(table, rows, 2)] == [2, 2, 2, 1]


def test_dropout_of_the_base_is_off_unless_asked_for(tmp_path: Path) -> None:
    base = load_model(build_family(tmp_path / "model", "gpt2"))
    assert find_dropout(base) == {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    assert switch_off_dropout(base) == {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    assert find_dropout(base) == {}
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(base.train()(ids).logits, base.train()(ids).logits)
    tokens = write_tokens(tmp_path / "tokens")
    losses = {}
    for base_dropout in (False, True):
        config = TrainingConfig(rank=4, max_steps=2, base_dropout=base_dropout)
        run = tmp_path / f"run-{base_dropout}"
        outcome = train_adapter(tmp_path / "model", tokens, run, config, seed=0, identity="x")
        losses[base_dropout] = outcome.final_loss
        said = [text for text in outcome.warnings if "the base model's own dropout" in text]
        assert len(said) == 1
        assert "attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1" in said[0]
        assert ("is off" in said[0]) != base_dropout
    assert abs(losses[True] - losses[False]) > 1e-4


@pytest.mark.parametrize("family", FLAT)
def test_real_loop_has_the_losses_of_the_plain_one(tmp_path: Path, family: str) -> None:
    from tasks.training.micro_batches import iterate_steps
    from tests.tasks.training.test_reference import read_examples

    base_model = build_family(tmp_path / "model", family)
    tokens = write_tokens(tmp_path / "tokens", num_train=20, num_eval=2)
    config = TrainingConfig(
        rank=4, alpha=8, learning_rate=1e-2, micro_batch=3, gradient_accumulation_steps=2, max_steps=6, num_epochs=9,
        engine="general",
    )  # fmt: skip
    records: list[StepRecord] = []
    train_adapter(base_model, tokens, tmp_path / "run", config, seed=7, identity="x", on_step=records.append)
    examples = read_examples(tokens)
    table, rows = read_tokens(tokens / "train.parquet")
    batches = iterate_steps(table, rows, config, seed=7, first=0, last=6)
    steps = [[examples[name] for batch in step for name in batch.example_ids] for step in batches]
    base = load_model(base_model)
    switch_off_dropout(base)
    model = attach_adapter(base, config, seed=7).train()
    losses = list(fine_tune(model, steps, [learning_rate(step, 6, config) for step in range(6)]))
    assert [record.loss for record in records] == pytest.approx(losses, abs=1e-4)


def test_log_says_what_other_kinds_of_adapter_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base_model = build_family(tmp_path / "model", "llama", tie_word_embeddings=False)
    tokens = write_tokens(tmp_path / "tokens", num_train=4, num_eval=1)
    caplog.set_level("INFO")
    config = TrainingConfig(rank=4, alpha=8, use_dora=True, use_rslora=True, modules_to_save=("lm_head",), max_steps=1)
    train_adapter(base_model, tokens, tmp_path / "run", config, seed=0, identity="x")
    said = [record.getMessage() for record in caplog.records]
    assert "rsLoRA trains with the general engine at no cost: the adapter's scale alone differs (4)" in said
    assert any(text.startswith("DoRA trains with the general engine: every pass computes B A") for text in said)
    # 97 words of 32 values, 16 bytes each.
    assert "lm_head train in full with the general engine: 3,104 values, 0.00 GiB with their gradient and AdamW's" in (
        " ".join(said)
    )


def test_delta_nets_of_trained_weights_keep_examples_apart_and_give_their_way_back(
    tmp_path: Path, table: TokenTable
) -> None:
    model: Any = load_model(build_family(tmp_path, "qwen3_5_text")).train().requires_grad_(True)
    wanted = one_by_one(model, table)
    assert any("conv1d" in name for name in wanted[1])
    assert any("A_log" in name for name in wanted[1])
    engine, notes = choose(model, table)
    assert (engine.attend is not None, notes) == (True, [])
    assert_same(through(engine, table), wanted)
    (net,) = find_delta_nets(model)
    before = net.forward
    give_back = use_flat_delta_nets([net], is_plain=True)
    assert net.forward is not before
    give_back()
    assert net.forward is before
