"""Frozen weights divided among ranks: the same losses and gradients, and no more in memory than the law says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from schemas.config import TrainingConfig
from tasks.decoder import decoder as decoder_module
from tasks.decoder.decoder import LOGITS_BYTES, Decoder
from tasks.decoder.divided import DividedLayers, DividedWeightsError
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.grouped import GroupedProjection
from tasks.decoder.layer import run_layer
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.throughput import count_useful_flop
from tests.tasks.decoder.plain_float8 import build_operations, load_quantized, quantize_rows
from tests.tasks.decoder.small_models import (
    FAMILIES,
    build,
    compute_fused,
    draw_table,
    make_model,
    measure_difference,
    name_attention_modules,
    take_grads,
)
from tests.tasks.training.ranks import on_two_ranks

CPU = torch.device("cpu")


def divide(model: Any, *, recomputed: int = 0) -> FusedEngine:
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    return FusedEngine(decoder, CPU, 4096, recomputed, LOGITS_BYTES, 4096)


def compute(engine: FusedEngine, model: Any) -> tuple[float, Any]:
    loss = engine.sum_losses(form_flat_batch(draw_table(), range(5)))
    loss.backward()
    return float(loss.detach()), take_grads(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [0, 2])
def test_loss_and_gradient_are_those_of_whole_weights(family: str, recomputed: int) -> None:
    settings: dict[str, Any] = {} if family in ("gpt_oss", "gemma4_moe") else {"dropout": 0.25}
    loss, grads = compute_fused(
        build(family, torch.float32, **settings), form_flat_batch(draw_table(), range(5)), recomputed=recomputed
    )
    model = build(family, torch.float32, **settings)
    engine = divide(model, recomputed=recomputed)
    for _ in range(2):  # what is left in the slots by the first pass is right for the second
        found_loss, found_grads = compute(engine, model)
        assert found_loss == loss
        assert torch.equal(found_grads, grads)


def compute_on_a_rank(number: int, families: list[str]) -> list[tuple[float, Any, float, Any]]:
    """Return each family's loss and gradient, and those after what is trained has moved."""
    found = []
    for family in families:
        model = build(family, torch.float32)
        engine = divide(model, recomputed=1)
        before = compute(engine, model)
        move(model)
        engine.decoder.invalidate()
        found.append((*before, *compute(engine, model)))
    return found


def move(model: Any) -> None:
    with torch.no_grad():
        for parameter in collect_trained(model).values():
            parameter.mul_(1.5)


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    families = ["llama", "gemma4_text", "qwen3_next", "gpt_oss", "deepseek_v3"]
    ranks = on_two_ranks(compute_on_a_rank, families, folder=tmp_path / "ranks")
    for number, family in enumerate(families):
        model, batch = build(family, torch.float32), form_flat_batch(draw_table(), range(5))
        loss, grads = compute_fused(model, batch, recomputed=1)
        move(model)
        moved_loss, moved_grads = compute_fused(model, batch, recomputed=1)
        for told in ranks:
            found_loss, found_grads, found_moved_loss, found_moved_grads = told[number]
            assert (found_loss, found_moved_loss) == (loss, moved_loss)
            assert torch.equal(found_grads, grads)
            assert torch.equal(found_moved_grads, moved_grads)
            assert measure_difference(moved_grads, grads) > 0.1


def count_on_a_rank(number: int, num_layers: int) -> tuple[int, int]:
    """Return the bytes that a rank holds for the layers, and of the modules' own weights that are left."""
    model = build_deep(num_layers)
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    assert decoder.divided is not None
    inside = [parameter for layer in decoder.divided.modules for parameter in layer.parameters()]
    left = sum(parameter.numel() for parameter in inside if not parameter.requires_grad and parameter.dim() > 1)
    return decoder.divided.held_bytes, left


def build_deep(num_layers: int) -> Any:
    return attach_adapter(make_model("llama", num_hidden_layers=num_layers), TrainingConfig(rank=1), seed=1)


def test_a_rank_holds_its_share_and_two_layers(tmp_path: Path) -> None:
    for num_layers in (8, 16):
        model = build_deep(num_layers)
        layer = sum(p.numel() for p in model.get_base_model().model.layers[0].parameters() if not p.requires_grad) * 4
        for held, left in on_two_ranks(count_on_a_rank, num_layers, folder=tmp_path / f"ranks-{num_layers}"):
            # The joint matrices have room for the adapter, of rank 1, and begin on 256 bytes.
            assert layer * (num_layers / 2 + 2) <= held <= 1.06 * layer * (num_layers / 2 + 2)
            assert left == 0


def read_other_weights(number: int) -> None:
    model: Any = build("llama", torch.float32)
    if number == 1:
        model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data[3, 5] += 1e-3
    recognize_decoder(model, divided=DividedLayers(CPU))


def test_ranks_with_other_weights_are_found_by_all(tmp_path: Path) -> None:
    for error in on_two_ranks(read_other_weights, folder=tmp_path / "ranks"):
        assert isinstance(error, DividedWeightsError)
        assert "the ranks have read different files" in str(error)


def test_a_layer_that_was_not_gathered_gives_nothing_but_nan() -> None:
    model = build("qwen3_moe", torch.float32)
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    assert decoder.divided is not None
    decoder.divided.hold(0)
    decoder.divided.hold(1)
    decoder.divided.hold(2)
    assert has_weights(decoder) == [False, True, True]
    assert decoder.layers[0].experts is not None
    down = decoder.layers[0].experts.down
    assert isinstance(down, GroupedProjection)
    assert down.matrices.isnan().all()
    decoder.divided.forget()
    assert has_weights(decoder) == [False, False, False]


def has_weights(decoder: Decoder) -> list[bool]:
    return [bool(layer.qkv.matrix.isfinite().all()) for layer in decoder.layers]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe", "gpt_oss", "qwen3_5_text"])
def test_what_is_given_back_is_the_model(family: str) -> None:
    settings: dict[str, Any] = {"target_modules": name_attention_modules(family)} if family == "gpt_oss" else {}
    whole = {name: value.clone() for name, value in build(family, torch.float32, **settings).state_dict().items()}
    model = build(family, torch.float32, **settings)
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    assert decoder.divided is not None
    held = sum(value.numel() for value in model.state_dict().values())
    assert held < sum(value.numel() for value in whole.values())
    decoder.divided.give_back()
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name]), name


def test_the_models_own_layers_compute_with_what_is_gathered() -> None:
    model = build("llama", torch.float32).eval()
    ids = torch.arange(12)[None]
    expected = model(input_ids=ids).logits
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    assert decoder.divided is not None
    with decoder.divided.lent(), torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert isinstance(decoder.divided.modules[0], nn.Module)
    with pytest.raises(RuntimeError), torch.no_grad():
        model(input_ids=ids)


def compute_in_8_bits(number: int, families: list[str], *, is_whole: bool = False) -> list[tuple[float, Any, float]]:
    """Return each family's loss and gradient with float8 weights, and the bytes that this rank holds for the layers."""
    operations, found = build_operations(), []
    load_quantized().quantize_rows = quantize_rows  # type: ignore[attr-defined]
    for family in families:
        model: Any = build(family, torch.bfloat16)
        decoder = recognize_decoder(model, divided=None if is_whole else DividedLayers(CPU))
        before = 0 if decoder.divided is None else decoder.divided.held_bytes
        decoder = replace(quantize_decoder(decoder), ops=operations)
        for recomputed in (0, 2):
            engine = FusedEngine(decoder, CPU, 4096, recomputed, LOGITS_BYTES, 4096)
            loss, grads = compute(engine, model)
            held = 0 if decoder.divided is None else decoder.divided.held_bytes / before
            found.append((loss, grads, held))
    return found


def test_divided_float8_weights_compute_what_whole_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families = ["llama", "phi3", "qwen3_moe"]
    monkeypatch.setattr(load_quantized(), "quantize_rows", quantize_rows)
    wanted = compute_in_8_bits(0, families, is_whole=True)
    for told in on_two_ranks(compute_in_8_bits, families, folder=tmp_path / "ranks"):
        for (loss, grads, held), (wanted_loss, wanted_grads, _) in zip(told, wanted, strict=True):
            assert loss == wanted_loss
            assert torch.equal(grads, wanted_grads)
            assert held < 1.1  # a dense weight lies twice, once for each way
    experts = [held for (_, _, held), family in zip(told, [name for name in families for _ in range(2)], strict=True)]
    assert max(experts[-2:]) < min(experts[:2])


def test_a_layer_is_gathered_while_its_neighbour_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is begun and what is used, in order: the next layer is under way before a layer is computed, both ways."""
    told: list[str] = []

    def bring(self: DividedLayers, layer: Any, slot: Any, names: Any, inner: Any = DividedLayers._bring) -> None:
        told.append(f"gather {slot.number}")
        inner(self, layer, slot, names)

    def run(layer: Any, *arguments: Any, inner: Any = run_layer, **settings: Any) -> Any:
        told.append(f"run {numbers[id(layer)]}")
        return inner(layer, *arguments, **settings)

    model = build_deep(5)
    engine = divide(model, recomputed=0)
    numbers = {id(layer): number for number, layer in enumerate(engine.decoder.layers)}
    compute(engine, model)
    move(model)
    engine.decoder.invalidate()
    monkeypatch.setattr(DividedLayers, "_bring", bring)
    monkeypatch.setattr(decoder_module, "run_layer", run)
    loss = engine.sum_losses(form_flat_batch(draw_table(), range(5)))
    forward = ["gather 0", "gather 1", "run 0", "gather 2", "run 1", "gather 3", "run 2", "gather 4", "run 3", "run 4"]
    assert told == forward
    told.clear()
    loss.backward()  # the last two layers are there still
    assert told == ["gather 2", "gather 1", "gather 0"]
    told.clear()
    compute(engine, model)  # the first two are there: nothing of the adapter has changed
    assert told == [*forward[2:], "gather 2", "gather 1", "gather 0"]
    told.clear()
    again = replace(engine, num_recomputed=5)
    compute(again, model)
    backward = ["run 4", "gather 2", "run 3", "gather 1", "run 2", "gather 0", "run 1", "run 0"]
    assert told == [*forward[2:], *backward]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_useful_work_is_that_of_whole_weights(family: str, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_quantized(), "quantize_rows", quantize_rows)
    model = build(family, torch.bfloat16)
    whole = count_useful_flop(model)
    decoder = recognize_decoder(model, divided=DividedLayers(CPU))
    if fp8:
        quantize_decoder(decoder)
    assert count_useful_flop(model) == whole > 0
