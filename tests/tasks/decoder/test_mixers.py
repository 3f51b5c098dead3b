"""The parts of further mixers, each against a slow and simple oracle."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.decoder import delta_rule, elementwise, mixer_elementwise, wide_attention
from tasks.decoder.attention import Segments, attend_one_by_one
from tasks.decoder.delta_rule import UnitLength, run_plain_rule
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.decoder.wide_attention import attend_in_batches, form_batches
from tasks.training.batches import form_flat_batch
from tests.tasks.decoder.small_models import build, compute_fused, compute_reference, draw_table

LENGTHS = (70, 1, 130, 3, 64, 5)


def form_segments(lengths: tuple[int, ...]) -> Segments:
    return Segments(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), lengths)


def run_token_by_token(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """The rule as it is defined: one state for each head of an example, changed by each of its tokens."""
    groups = values.shape[1] // keys.shape[1]
    queries, keys = (
        (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(groups, 1) for x in (queries, keys)
    )
    results = []
    for begin, length in zip(accumulate((0, *lengths)), lengths, strict=False):
        state = values.new_zeros(values.shape[1], keys.shape[-1], values.shape[-1])
        for t in range(begin, begin + length):
            state = state * log_decay[t].exp()[:, None, None]
            wrong = values[t] - torch.einsum("hkv,hk->hv", state, keys[t])
            state = state + torch.einsum("hk,hv->hkv", keys[t], beta[t][:, None] * wrong)
            results.append(torch.einsum("hkv,hk->hv", state, queries[t]) * keys.shape[-1] ** -0.5)
    return torch.stack(results)


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (3, 2)])
def test_the_chunked_rule_is_the_recurrence_and_keeps_examples_apart(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    made: list[Any] = [torch.randn(total, heads, size, dtype=torch.float64) for heads, size in ((2, 8), (2, 8), (4, 6))]
    made += [-torch.rand(total, 4, dtype=torch.float64) * 3, torch.rand(total, 4, dtype=torch.float64)]
    inputs = q, k, v, g, b = tuple(x.requires_grad_() for x in made)
    found = run_plain_rule(q, k, v, g, b, form_segments(lengths))
    wanted = run_token_by_token(q, k, v, g, b, lengths)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, inputs, weights), torch.autograd.grad(wanted, inputs, weights), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right)


def test_a_unit_length_is_the_root_of_the_sum_of_squares() -> None:
    torch.manual_seed(0)
    states = torch.randn(7, 3, 8, dtype=torch.float64)
    states[2] *= 1e-4  # where the least that is added to the sum counts
    states.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: UnitLength.apply(x, elementwise), (states,))
    lengths = (states.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(UnitLength.apply(states, elementwise), states / lengths)


@pytest.mark.parametrize("lengths", [LENGTHS, (9,), (8, 8, 100)])
@pytest.mark.parametrize(("longest", "score_bytes"), [(4096, 1 << 28), (4096, 1 << 12), (40, 1 << 28), (0, 1)])
def test_attention_in_batches_is_that_of_each_segment_alone(
    lengths: tuple[int, ...], longest: int, score_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide_attention, "_LONGEST", longest)
    monkeypatch.setattr(wide_attention, "_SCORE_BYTES", score_bytes)
    torch.manual_seed(0)
    inputs = q, k, v = tuple(
        torch.randn(sum(lengths), heads, 24, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)
    )
    batches = form_batches(lengths, torch.device("cpu"))
    found = attend_in_batches(q, k, v, batches, scale=0.3)
    wanted = attend_one_by_one(q, k, v, form_segments(lengths), scale=0.3, window=None)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, inputs, weights), torch.autograd.grad(wanted, inputs, weights), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right)
    # What fills the batches up is less than the tokens themselves.
    assert len(batches.places) < 2 * sum(lengths) + 8 * len(lengths)


def test_gradients_of_the_parts_are_autograds() -> None:
    torch.manual_seed(0)
    values = torch.randn(12, 30, dtype=torch.float64, requires_grad=True)
    columns, weight = torch.randperm(30)[:20].int(), torch.randn(20, 4, dtype=torch.float64)
    positions = torch.tensor([0, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2])
    result = mixer_elementwise.convolve(values, columns, weight, positions)
    grad, found = torch.randn_like(result), torch.zeros_like(values)
    (wanted,) = torch.autograd.grad(result, values, grad)
    mixer_elementwise.convolve_backward(grad, values.detach(), columns, weight, positions, found)
    torch.testing.assert_close(found, wanted)

    heads, gates = (torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factor = torch.rand(8, dtype=torch.float64)
    gated = mixer_elementwise.gate_norm(heads, gates, factor, 1e-6)
    grad = torch.randn_like(gated)
    both = mixer_elementwise.gate_norm_backward(grad, heads.detach(), gates.detach(), factor, 1e-6)
    for left, right in zip(both, torch.autograd.grad(gated, (heads, gates), grad), strict=True):
        torch.testing.assert_close(left, right)

    cos, sin = torch.randn(2, 5, 3, dtype=torch.float64)
    turned = mixer_elementwise.turn_heads(heads, factor, 1e-6, cos, sin)
    grad, once = torch.randn_like(turned), torch.ones_like(heads)
    (wanted,) = torch.autograd.grad(turned, heads, grad)
    mixer_elementwise.turn_heads_backward(grad, heads.detach(), factor, 1e-6, cos, sin, once, adds=True)
    torch.testing.assert_close(once, wanted + 1)


def test_a_net_that_is_not_the_known_one_is_refused_by_name() -> None:
    model = build("qwen3_5_text", torch.float32)
    base: Any = model.get_base_model()
    net = base.model.layers[0].linear_attn
    net.further = torch.nn.Identity()
    with pytest.raises(UnknownDecoderError, match="Qwen3_5GatedDeltaNet has other modules than is known: further"):
        recognize_decoder(model)
    del net.further
    net.activation = "gelu"
    with pytest.raises(UnknownDecoderError, match="not followed by silu"):
        recognize_decoder(model)


def test_gemma_4_with_experts_is_refused_before_a_weight_moves() -> None:
    model = build("gemma4_text", torch.float32)
    base: Any = model.get_base_model()
    layer = base.model.layers[1]
    layer.router = torch.nn.Identity()
    before = layer.mlp.up_proj.base_layer.weight.data_ptr()
    with pytest.raises(UnknownDecoderError, match="other modules than is known: router"):
        recognize_decoder(model)
    assert layer.mlp.up_proj.base_layer.weight.data_ptr() == before


def test_a_layers_scale_is_that_of_its_buffer_whatever_its_dtype() -> None:
    table, model = draw_table(), build("gemma4_text", torch.bfloat16)
    base: Any = model.get_base_model()
    plain, _ = compute_fused(model, form_flat_batch(table, range(5)))
    base.model.layers[1].layer_scalar = torch.full((1,), 0.3)
    loss, _ = compute_reference(model, table)
    found, _ = compute_fused(model, form_flat_batch(table, range(5)))
    assert found == pytest.approx(loss, rel=3e-3)
    assert plain != pytest.approx(loss, rel=6e-3)


@pytest.mark.parametrize(
    ("capability", "triton", "has_tilelang", "refused"),
    [
        ((9, 0), "3.6.0", False, True),
        ((9, 0), "3.7.0+git1", False, True),
        ((9, 0), "3.7.1", False, False),
        ((9, 0), "3.6.0", True, False),
        ((8, 0), "3.6.0", False, False),
        ((9, 0), "3.3.1", False, False),
    ],
)
def test_kernels_that_a_compiler_spoils_are_left_out(
    capability: tuple[int, int],
    triton: str,
    has_tilelang: bool,
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their own check comes in the middle of a backward pass, which would end the run."""
    installed = {"fla", "tilelang"} if has_tilelang else {"fla"}
    monkeypatch.setattr(delta_rule, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(delta_rule, "version", lambda package: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    delta_rule._find_fla.cache_clear()
    rules = delta_rule.find_delta_rules(torch.device("cuda"), torch.bfloat16)
    delta_rule._find_fla.cache_clear()
    assert rules == (run_plain_rule,)  # fla is not installed here, so it does not import where it is not refused
    assert ("Triton 3.7.1" in caplog.text) == refused
