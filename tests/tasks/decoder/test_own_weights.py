"""The fused decoder with trained weights of its own, against the model's own forward pass, in small sizes."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.passing_copies import PassingCopies, pass_copies
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.choice import save_copies
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import collect_trained
from tasks.training.own_weights import choose_weights
from tasks.training.reference import sum_losses
from tests.tasks.decoder.small_models import (
    EXPERTS,
    FAMILIES,
    draw_table,
    list_examples,
    make_model,
    measure_difference,
)

ADAPTERS_ALONE = ["gemma4_text", "qwen3_5_text", "olmo_hybrid", "youtu", *EXPERTS]
PLAIN = [family for family in FAMILIES if family not in ADAPTERS_ALONE]
CPU = torch.device("cpu")
SCALE = 1 / 37
ORDER = [3, 0, 4, 1, 2]


def build(family: str, dtype: torch.dtype = torch.float32, *, tied: bool | None = None, **settings: Any) -> Any:
    """A small model with weights of every kind off their start; what the settings say is trained."""
    model = make_model(family, **({} if tied is None else {"tie_word_embeddings": tied}))
    chosen = TrainingConfig.model_validate({"method": "full", **settings})
    return choose_weights(model, chosen, dtype=dtype).train()


def take_grads(model: Any) -> dict[str, Tensor]:
    """The gradients in fp64; they are zero in the model then."""
    grads = {}
    for name, parameter in collect_trained(model).items():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        grads[name] = found.double().clone()
        if parameter.grad is not None:
            parameter.grad.zero_()
    return grads


def compute_reference(model: Any, dtype: torch.dtype = torch.float32) -> tuple[float, dict[str, Tensor]]:
    total = torch.zeros(())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for example in list_examples(draw_table()):
            if len(example.input_ids) > 1:
                total = total + sum_losses(model, example)
    total.backward()
    grads = take_grads(model)
    for parameter in model.parameters():
        parameter.grad = None
    return float(total.detach()), grads


def recognize(model: Any, dtype: torch.dtype = torch.float32, *, recomputed: int = 0) -> FusedEngine:
    return FusedEngine(recognize_decoder(model, dtype), CPU, 4096, recomputed, LOGITS_BYTES, 4096)


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The difference of all, and of each tensor by its own norm."""
    assert found.keys() == wanted.keys()
    whole = measure_difference(
        torch.cat([found[name].flatten() for name in wanted]), torch.cat([grad.flatten() for grad in wanted.values()])
    )
    return whole, {name: measure_difference(found[name], grad) for name, grad in wanted.items() if grad.norm() > 1e-6}


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("recomputed", [0, 3])
def test_loss_and_every_gradient_are_the_models_own(family: str, recomputed: int) -> None:
    model = build(family)
    loss, wanted = compute_reference(model)
    engine, batch = recognize(model, recomputed=recomputed), form_flat_batch(draw_table(), ORDER)
    found = engine.sum_losses(batch)
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-6)
    whole, each = compare(take_grads(model), wanted)
    assert whole < 1e-5
    assert max(each.values()) < 1e-4, each

    for parameter in model.parameters():
        parameter.grad = None
    assert engine.bind_gradients() is not None
    for _ in range(2):  # what is added in place adds up
        replayed = engine.replay_gradient(batch, SCALE)
        assert replayed is not None
        assert float(replayed) == pytest.approx(loss, rel=1e-6)
    whole, each = compare({name: grad / (2 * SCALE) for name, grad in take_grads(model).items()}, wanted)
    assert whole < 1e-5
    assert max(each.values()) < 1e-4, each
    (SCALE * engine.sum_losses(batch)).backward()  # weights that are not known before
    whole, each = compare({name: grad / SCALE for name, grad in take_grads(model).items()}, wanted)
    assert whole < 1e-5
    assert max(each.values()) < 1e-4, each


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_learn_chunk_by_chunk(tied: bool) -> None:
    table = draw_table((90, 120, 150))
    found = []
    for logits_bytes in (LOGITS_BYTES, 1):  # all 178 rows at once, or 64 at a time
        model = build("llama", tied=tied)
        engine = FusedEngine(recognize_decoder(model, torch.float32), CPU, 4096, 0, logits_bytes, 4096)
        batch = form_flat_batch(table, range(3))
        engine.sum_losses(batch).backward()
        found.append(take_grads(model))
        assert engine.bind_gradients() is not None
        assert engine.replay_gradient(batch, 1.0) is not None
        found.append(take_grads(model))
    assert ("lm_head.weight" in found[0]) != tied
    for other in found[1:]:
        whole, each = compare(other, found[0])
        assert whole < 1e-6
        assert max(each.values()) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi3", "granite"])
def test_in_16_bits_it_is_as_near_to_fp32_as_the_model_under_autocast(family: str) -> None:
    _, exact = compute_reference(build(family))
    model = build(family, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    _, general = compute_reference(model, torch.bfloat16)
    engine = recognize(model, torch.bfloat16)
    assert engine.bind_gradients() is not None
    assert engine.replay_gradient(form_flat_batch(draw_table(), ORDER), 1.0) is not None
    fused, _ = compare(take_grads(model), exact)
    # The stream is bf16 here, and fp32 there.
    assert fused < 2 * compare(general, exact)[0] < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_moved_are_seen(dtype: torch.dtype) -> None:
    model = build("gemma3_text", dtype)
    engine, batch = recognize(model, dtype), form_flat_batch(draw_table(), ORDER)
    optimizer = torch.optim.AdamW(list(collect_trained(model).values()), lr=1e-2, fused=True)
    engine.attach_to(optimizer)
    assert engine.bind_gradients() is not None
    first = engine.replay_gradient(batch, 1.0)
    assert first is not None
    optimizer.step()
    with torch.no_grad():
        second = float(engine.sum_losses(batch))
    take_grads(model)
    loss, _ = compute_reference(model, dtype)
    assert second == pytest.approx(loss, rel=1e-5 if dtype == torch.float32 else 2e-3)
    assert abs(second - float(first)) > 0.02 * loss


@pytest.mark.parametrize(
    "settings",
    [
        {"trained_layers": 1},
        {"trained_layers": 0, "trained_modules": ("layers.1.mlp", "q_proj")},
        {"trained_layers": 0, "trained_modules": ("input_layernorm", "k_norm", "model.norm")},
        {"trained_layers": 0, "trained_modules": ("lm_head",)},
        {"trained_layers": 1, "trained_modules": ("embed_tokens",)},
    ],
    ids=["last", "some", "norms", "head", "first"],
)
@pytest.mark.parametrize("recomputed", [0, 3])
def test_some_weights_learn_and_nothing_else(settings: dict[str, Any], recomputed: int) -> None:
    model = build("qwen3", tied=False, method="freeze", **settings)
    loss, wanted = compute_reference(model)
    assert 0 < len(wanted) < len(list(model.parameters()))
    engine, batch = recognize(model, recomputed=recomputed), form_flat_batch(draw_table(), ORDER)
    assert engine.bind_gradients() is not None
    replayed = engine.replay_gradient(batch, 1.0)
    if replayed is None:  # the head is frozen
        replayed = engine.sum_losses(batch)
        replayed.backward()
    assert float(replayed.detach()) == pytest.approx(loss, rel=1e-6)
    assert {id(parameter) for parameter in model.parameters() if parameter.grad is not None} == {
        id(parameter) for parameter in collect_trained(model).values()
    }
    whole, each = compare(take_grads(model), wanted)
    assert whole < 1e-5
    assert max(each.values()) < 1e-4, each


def test_the_pads_row_learns_of_the_head_alone() -> None:
    model = build("llama", tied=True)
    model.model.embed_tokens.padding_idx = 3
    _, wanted = compute_reference(model)
    engine = recognize(model)
    engine.sum_losses(form_flat_batch(draw_table(), ORDER)).backward()
    assert compare(take_grads(model), wanted)[0] < 1e-5


@pytest.mark.parametrize("family", ADAPTERS_ALONE)
def test_what_trains_adapters_alone_is_refused(family: str) -> None:
    model = build(family)
    with pytest.raises(UnknownDecoderError, match="trained"):
        recognize_decoder(model, torch.float32)


def test_a_weight_outside_of_what_is_known_is_refused() -> None:
    model = build("llama")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnknownDecoderError, match=r"extra\.weight is trained"):
        recognize_decoder(model, torch.float32)


def list_matrices(layer: Any) -> list[Tensor]:
    return [projection.matrix for projection in layer.projections]


def use_passing_copies(engine: FusedEngine) -> FusedEngine:
    passing = pass_copies(engine.decoder)
    assert passing is not None
    return replace(engine, decoder=replace(engine.decoder, divided=passing))


on_every_device = pytest.mark.parametrize(
    "device",
    [
        CPU,
        pytest.param(
            torch.device("cuda"),
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
    ids=str,
)


@on_every_device
@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("recomputed", [0, 2])
def test_copies_of_two_layers_at_a_time_compute_the_same(family: str, recomputed: int, device: torch.device) -> None:
    """Bit by bit, before and after the weights have moved, and without a gradient; on a GPU the losses alone."""
    batch = form_flat_batch(draw_table(), ORDER)
    found = []
    for is_passing in (False, True):
        model = build(family, torch.bfloat16).to(device)
        engine = replace(recognize(model, torch.bfloat16, recomputed=recomputed), device=device)
        engine = use_passing_copies(engine) if is_passing else engine
        assert engine.describe().endswith("16-bit copies of two layers at a time") == is_passing
        optimizer = torch.optim.AdamW(list(collect_trained(model).values()), lr=1e-2, fused=True)
        engine.attach_to(optimizer)
        assert engine.bind_gradients() is not None
        told: list[Any] = []
        for _ in range(2):
            loss = engine.replay_gradient(batch, SCALE)
            assert loss is not None
            optimizer.step()
            with torch.no_grad():
                told += [float(loss), float(engine.sum_losses(batch))]
        found.append((told, take_grads(model)))
    (told, grads), (other_told, other_grads) = found
    assert told == other_told
    assert told[2] != told[0]
    for name, grad in grads.items():
        if device.type == "cpu":
            assert torch.equal(grad, other_grads[name]), name
        else:  # whose kernels add some gradients in the order in which they come
            torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_copies_that_no_layer_in_a_slot_has_take_no_memory() -> None:
    model = build("llama", torch.bfloat16)
    engine = use_passing_copies(recognize(model, torch.bfloat16))
    assert engine.decoder.weights is not None
    held = {copy.target.untyped_storage().data_ptr() for copy in engine.decoder.weights.copies}
    kept = [matrix for layer in engine.decoder.layers for matrix in list_matrices(layer)]
    assert all(matrix.untyped_storage().nbytes() == 2 and bool(matrix.isnan().all()) for matrix in kept)
    assert held.isdisjoint(matrix.untyped_storage().data_ptr() for matrix in kept)
    with torch.no_grad():
        engine.sum_losses(form_flat_batch(draw_table(), ORDER))
    are_shown = [not list_matrices(layer)[0].isnan().any() for layer in engine.decoder.layers]
    assert are_shown == [False] * (len(are_shown) - 2) + [True, True]


def test_frozen_layers_keep_their_matrices_and_fp32_has_no_copies() -> None:
    model = build("qwen3", torch.bfloat16, method="freeze", trained_layers=1)
    engine = use_passing_copies(recognize(model, torch.bfloat16))
    first, *_, last = engine.decoder.layers
    assert not any(matrix.isnan().any() for matrix in list_matrices(first))
    assert all(matrix.isnan().all() for matrix in list_matrices(last))
    assert pass_copies(recognize(build("qwen3")).decoder) is None


@pytest.mark.parametrize("is_full", [False, True])
def test_copies_pass_where_the_memory_is_short_for_all(is_full: bool) -> None:
    """Of an engine that had to cut its passes, or recomputes although it need not; another one is left as it is."""
    model = build("llama", torch.bfloat16)
    short = replace(recognize(model, torch.bfloat16, recomputed=2), tokens_per_forward=2048)
    fitted: list[FusedEngine] = []

    def fit(engine: FusedEngine) -> FusedEngine:
        fitted.append(engine)
        return replace(engine, num_recomputed=1)

    keeping, full = replace(short, num_recomputed=0), replace(short, tokens_per_forward=8192)
    for enough, may_keep in ((keeping, True), (full, False)):
        assert save_copies(enough, 16384, fit, may_keep=may_keep) is enough
    leaner = save_copies(full if is_full else short, 16384, fit, may_keep=is_full)
    assert isinstance(leaner.decoder.divided, PassingCopies)
    assert leaner.num_recomputed == 1
    assert [engine.num_recomputed for engine in fitted] == [0]
    assert save_copies(leaner, 16384, fit, may_keep=is_full) is leaner
