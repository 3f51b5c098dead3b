"""Attention with sinks against transformers' own of gpt-oss, and what turns an attention without them into it."""

from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from tasks.decoder.attention import Segments, attend_one_by_one
from tasks.decoder.sinks import fold_sinks

LENGTHS = (17, 1, 40)
SINKS = torch.tensor([-2.0, 0.0, 1.5, 4.0], dtype=torch.float64)


def draw_states() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def attend_as_transformers(states: list[Tensor], window: int | None) -> Tensor:
    module: Any = SimpleNamespace(num_key_value_groups=2, sinks=SINKS, training=False)
    results = []
    for parts in zip(*(part.split(LENGTHS) for part in states), strict=True):
        length = len(parts[0])
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        hidden = (distance < 0) | (distance >= (window or length))
        mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        results.append(eager_attention_forward(module, query, key, value, mask[None, None], 0.4)[0][0])
    return torch.cat(results)


def assert_same_gradients(found: Tensor, wanted: Tensor, states: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    pairs = zip(torch.autograd.grad(found, states, weights), torch.autograd.grad(wanted, states, weights), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("window", [None, 5])
def test_the_exact_attention_is_transformers(window: int | None) -> None:
    states = q, k, v = draw_states()
    segments = Segments(torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32), LENGTHS)
    found = attend_one_by_one(q, k, v, segments, scale=0.4, window=window, sinks=SINKS)
    assert_same_gradients(found, attend_as_transformers(states, window), states)
    without = attend_one_by_one(q, k, v, segments, scale=0.4, window=window)
    assert float((found - without).detach().norm() / without.detach().norm()) > 0.3


class Folded(torch.autograd.Function):
    """As `FlashSinks`, of one example, through the kernels that PyTorch has for a CPU."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor) -> Tensor:
        states = [part.transpose(0, 1)[None] for part in (queries, keys, values)]
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sums = attend(*states, 0.0, True, scale=0.4)
        folded, log_sums = fold_sinks(out[0].transpose(0, 1), log_sums[0], sinks)
        ctx.save_for_backward(*states, folded, log_sums)
        return folded

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *states, folded, log_sums = ctx.saved_tensors
        go_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        turned, out = (part.transpose(0, 1)[None] for part in (grad, folded))
        grads = go_back(turned, *states, out, log_sums[None], 0.0, True, scale=0.4)
        return *(part[0].transpose(0, 1) for part in grads), None


def test_an_attentions_own_backward_pass_is_right_once_sinks_are_in_its_output_and_log_sums() -> None:
    torch.manual_seed(0)
    states = q, k, v = [torch.randn(40, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    segments = Segments(torch.tensor([0, 40], dtype=torch.int32), (40,))
    wanted = attend_one_by_one(q, k, v, segments, scale=0.4, window=None, sinks=SINKS)
    found: Tensor = Folded.apply(*states, SINKS)
    assert_same_gradients(found, wanted, states)
