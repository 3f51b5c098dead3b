"""The fused decoder against the model's own forward pass, for each family, in small sizes."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.config import TrainingConfig
from tasks.decoder.attention import Segments, attend_one_by_one
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.grouped import GroupedProjection
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.micro_batches import form_flat_step
from tests.tasks.decoder.small_models import (
    EXPERTS,
    FAMILIES,
    LIMITS,
    build,
    compute_fused,
    compute_reference,
    draw_table,
    measure_difference,
    name_attention_modules,
    take_grads,
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [0, 2, 3])
def test_loss_and_gradient_are_the_references(family: str, recomputed: int) -> None:
    table = draw_table()
    model = build(family, torch.float32)
    loss, grads = compute_reference(model, table)
    fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, [3, 0, 4, 1, 2]), recomputed=recomputed)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert measure_difference(fused_grads, grads) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_in_16_bits_it_is_as_near_to_64_bits_as_the_model_itself(family: str) -> None:
    table = draw_table()
    _, exact = compute_reference(build(family, torch.float64), table)
    model = build(family, torch.bfloat16)
    _, general = compute_reference(model, table)
    _, fused = compute_fused(model, form_flat_batch(table, range(5)))
    if family in EXPERTS:  # a token at the border between two experts may go to the other one, in either way
        limit = LIMITS.get(family, 0.1)
        assert max(measure_difference(fused, exact), measure_difference(general, exact)) < limit
        return
    assert measure_difference(fused, exact) < 1.25 * measure_difference(general, exact) < LIMITS.get(family, 0.1)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_5_text", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_before_it_is_written(family: str, dtype: torch.dtype) -> None:
    """PyTorch fills new memory with NaN here; else it holds what lay there before, which is often zero."""
    model, batch = build(family, dtype), form_flat_batch(draw_table(), range(5))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss, grads = compute_fused(model, batch, recomputed=1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert math.isfinite(loss)
    assert grads.isfinite().all()


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("has_frozen", [True, False])
def test_frozen_experts_and_ranks_that_are_no_multiple_of_eight(family: str, has_frozen: bool) -> None:
    table = draw_table()
    settings: dict[str, Any] = {"use_rslora": True, "rank": 3}
    if has_frozen:
        settings = {"target_modules": name_attention_modules(family)}
    model = build(family, torch.float32, **settings)
    loss, grads = compute_reference(model, table)
    for recomputed in (0, 3):
        fused_loss, found = compute_fused(model, form_flat_batch(table, range(5)), recomputed=recomputed)
        assert fused_loss == pytest.approx(loss, rel=1e-6)
        assert measure_difference(found, grads) < 1e-5


def test_weights_of_experts_lie_once_and_answer_as_before() -> None:
    model = build("qwen3_moe", torch.float32)
    input_ids = torch.arange(12)[None]
    before = model(input_ids=input_ids).logits
    decoder = recognize_decoder(model)
    torch.testing.assert_close(model(input_ids=input_ids).logits, before, rtol=1e-5, atol=1e-6)
    experts = next(layer.experts for layer in decoder.layers if layer.experts is not None)
    for group in (experts.gate_up, experts.down):
        assert isinstance(group, GroupedProjection)
        weight = group.adapters.part.weight
        assert weight.untyped_storage().data_ptr() == group.matrices.untyped_storage().data_ptr()


def test_gradients_of_experts_are_added_in_place() -> None:
    table, model = draw_table(), build("qwen3_moe", torch.float32)
    _, grads = compute_reference(model, table)
    engine = FusedEngine(recognize_decoder(model), torch.device("cpu"), 4096, 0, LOGITS_BYTES, 4096)
    flat = engine.bind_gradients()
    assert flat is not None
    for indices in ([0, 3], [1, 2, 4]):
        engine.sum_losses(form_flat_batch(table, indices)).backward()
    parameters = collect_trained(model).values()
    assert flat.numel() == sum(parameter.numel() for parameter in parameters)
    found = torch.cat([parameter.grad.flatten().double() for parameter in parameters if parameter.grad is not None])
    assert measure_difference(found, grads) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: block.register_module("extra", torch.nn.Identity()), "other modules than is known: extra"),
        (lambda block: setattr(block, "jitter_noise", 0.1), "adds noise to what the router sees"),
        (lambda block: setattr(find_experts(block), "is_transposed", True), "has is_transposed True"),
        (lambda block: block.gate.weight.requires_grad_(True), "is trained"),
        (lambda block: delattr(block.gate, "top_k"), "not made as is known .*top_k"),
    ],
)
def test_experts_that_are_made_otherwise_are_refused(change: Callable[[Any], Any], reason: str) -> None:
    model = build("qwen3_moe", torch.float32)
    base: Any = model.get_base_model()
    change(base.model.layers[0].mlp)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(UnknownDecoderError, match=reason):
        recognize_decoder(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_clamped_experts_of_another_layout_are_refused() -> None:
    model = build("gpt_oss", torch.float32)
    base: Any = model.get_base_model()
    experts = find_experts(base.model.layers[2].mlp)
    experts.is_transposed = False
    with pytest.raises(UnknownDecoderError, match="GptOssExperts has is_transposed False"):
        recognize_decoder(model)
    experts.is_transposed = True
    del experts.limit
    with pytest.raises(UnknownDecoderError, match=r"not made as is known .*limit"):
        recognize_decoder(model)


def find_experts(block: Any) -> Any:
    experts = block.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return experts


def test_some_layers_adapted_and_rank_stabilized() -> None:
    table = draw_table()
    for settings in ({"target_modules": ("q_proj", "down_proj")}, {"use_rslora": True}):
        model = build("qwen2", torch.float32, **settings)
        loss, grads = compute_reference(model, table)
        fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, range(5)))
        assert fused_loss == pytest.approx(loss, rel=1e-6)
        assert measure_difference(fused_grads, grads) < 1e-5


@pytest.mark.parametrize(
    ("lengths", "indices", "untrained"),
    [
        ((5,), [0], ()),  # the padding is the longest segment
        ((64,), [0], ()),  # no padding at all
        ((5, 9), [0, 1], (0,)),  # an example without trained tokens beside one that has some
    ],
)
def test_odd_packs(lengths: tuple[int, ...], indices: list[int], untrained: tuple[int, ...]) -> None:
    table = draw_table(lengths, untrained=untrained)
    model = build("qwen3", torch.float32)
    loss, grads = compute_reference(model, table)
    fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, indices))
    assert math.isfinite(fused_loss)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert measure_difference(fused_grads, grads) < 1e-5


def test_pack_without_trained_tokens_has_no_loss_and_no_gradient() -> None:
    table = draw_table((5, 9), untrained=(0, 1))
    loss, grads = compute_fused(build("llama", torch.float32), form_flat_batch(table, [0, 1]))
    assert loss == 0.0
    assert not grads.any()


def test_adapter_that_moved_is_seen() -> None:
    table, model = draw_table(), build("qwen3", torch.float32)
    engine = FusedEngine(recognize_decoder(model), torch.device("cpu"), 4096, 0, LOGITS_BYTES, 4096)
    parameters = list(collect_trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    engine.attach_to(optimizer)
    batch = form_flat_batch(table, range(5))
    first = engine.sum_losses(batch)
    first.backward()
    optimizer.step()
    second = float(engine.sum_losses(batch).detach())
    take_grads(model)
    loss, _ = compute_reference(model, table)
    assert second == pytest.approx(loss, rel=1e-6)
    assert second != pytest.approx(float(first.detach()), rel=1e-3)


def test_model_still_answers_after_its_weights_moved() -> None:
    model = build("qwen2", torch.float32)
    input_ids = torch.arange(12)[None]
    before = model(input_ids=input_ids).logits
    recognize_decoder(model)
    assert torch.equal(model(input_ids=input_ids).logits, before)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA is on: .*lora_magnitude_vector"),
        ({"modules_to_save": ("embed_tokens",)}, "modules_to_save is set: .*embed_tokens.*is trained"),
        ({"target_modules": ("lm_head", "q_proj")}, "lm_head.*is trained"),
    ],
)
def test_what_it_does_not_do_it_refuses(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnknownDecoderError, match=reason):
        recognize_decoder(build("qwen2", torch.float32, **settings))


@pytest.mark.parametrize(
    ("family", "named"), [("gpt_neox", "none are found"), ("starcoder2", "Starcoder2DecoderLayer")]
)
def test_other_families_are_refused(family: str, named: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **shape))
    with pytest.raises(UnknownDecoderError, match=rf"layers that are not known \({named}\)"):
        recognize_decoder(attach_adapter(model, TrainingConfig(), seed=0))


def test_flat_steps_hold_every_example_once_and_are_even() -> None:
    lengths = [1 + (37 * number) % 50 for number in range(60)]
    table = draw_table(lengths)
    rows = [[number, number + 1] for number in range(0, 60, 2)]
    batches = form_flat_step(table, rows, 256, num_parts=4)
    names = [name for batch in batches for name in batch.example_ids]
    assert sorted(names) == sorted(table.example_ids)
    assert len(batches) % 4 == 0
    sizes = [batch.num_tokens for batch in batches]
    assert max(sizes) <= 256
    assert max(sizes) - min(sizes) <= 50
    assert sum(batch.num_trained_tokens for batch in batches) == int((table.targets >= 0).sum())


def test_example_above_the_budget_goes_alone() -> None:
    batches = form_flat_step(draw_table((300, 10, 10)), [[0], [1], [2]], 64)
    assert sorted(batch.num_tokens for batch in batches) == [20, 300]


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 10, 2, 8)
    together = attend_one_by_one(queries, keys, values, _lay((4, 6)), scale=0.3, window=None)
    alone = attend_one_by_one(queries[4:], keys[4:], values[4:], _lay((6,)), scale=0.3, window=None)
    torch.testing.assert_close(together[4:], alone)


def _lay(lengths: tuple[int, ...]) -> Segments:
    return Segments(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), lengths)
