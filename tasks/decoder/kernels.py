"""The functions of `elementwise` as Triton kernels, each one pass over its tensors. Imported where there is a GPU only.

Dimensions: `T` tokens, `H` hidden size, `I` intermediate size, `D` head size, `N` rows of logits, `V` vocabulary.

A program works on one token's row (or a block of it); all arithmetic is fp32, rounded once when stored. Row numbers are
64-bit: T * V passes 2^31.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from tasks.decoder.adapters import Copy
from tasks.decoder.copy_programs import copy_matrices_program
from tasks.decoder.dropout import COLUMNS_PER_CALL, MaskedTensor
from tasks.decoder.elementwise import Heads, Quantized
from tasks.decoder.gate_programs import (
    gate_backward_program,
    gate_backward_rows_program,
    gate_program,
    gate_rows_program,
)
from tasks.decoder.loss_programs import cross_entropy_program
from tasks.decoder.mask_programs import drop_backward_program, drop_program
from tasks.decoder.rotation_programs import rotate_backward_program, rotate_program
from tasks.decoder.row_programs import (
    add_norm_program,
    norm_backward_program,
    quantize_rows_program,
    sum_normed_program,
)

_GATE_BLOCK = 1024
_COPY_BLOCK = 4096
_TRITON_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_tables: dict[tuple[tuple[int, int, int, int, int, float], ...], tuple[Tensor, Tensor, int]] = {}
_VOCABULARY_BLOCK = 8192
_ROW_BLOCK = 4096
_SUM_ROWS, _SUM_BLOCK = 256, 128  # of a program that adds up rows


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    quantized: Quantized | None = None,
    dropped: MaskedTensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `elementwise.add_norm`; with a float8 copy of what goes to `out`."""
    num_tokens, width = residual.shape
    total = residual if delta is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=residual.device)
    block = _round_up(width)
    other = residual if delta is None else delta
    copy, copy_stride, key, *numbers = _unfold(dropped, rstd)
    add_norm_program[(num_tokens,)](
        residual, other, weight, total, out, rstd, *_side(quantized, rstd), copy, key,
        residual.stride(0), other.stride(0), total.stride(0), out.stride(0), copy_stride, width, eps, *numbers,
        HAS_DELTA=delta is not None, QUANTIZE=quantized is not None, DROP=dropped is not None,
        BLOCK=block, num_warps=_count_warps(block),
    )  # fmt: skip
    return total, rstd


def norm_backward(
    grad: Tensor,
    total: Tensor,
    rstd: Tensor,
    weight: Tensor,
    residual_grad: Tensor | None,
    out: Tensor,
    quantized: Quantized | None = None,
    side: MaskedTensor | None = None,
) -> None:
    """See `elementwise.norm_backward`; with a float8 copy of what goes to `out`."""
    num_tokens, width = total.shape
    block = _round_up(width)
    other = grad if residual_grad is None else residual_grad
    further, further_stride, key, *numbers = _unfold(side, rstd)
    norm_backward_program[(num_tokens,)](
        grad, total, rstd, weight, other, out, *_side(quantized, rstd), further, key,
        grad.stride(0), total.stride(0), other.stride(0), out.stride(0), further_stride, width, *numbers,
        HAS_RESIDUAL=residual_grad is not None, QUANTIZE=quantized is not None, DROP=side is not None,
        BLOCK=block, num_warps=_count_warps(block),
    )  # fmt: skip


def sum_normed(grad: Tensor, total: Tensor, rstd: Tensor) -> Tensor:
    """See `elementwise.sum_normed`; always in the same order."""
    num_rows, width = total.shape
    parts = triton.cdiv(num_rows, _SUM_ROWS)
    sums = torch.empty(parts, width, dtype=torch.float32, device=total.device)
    sum_normed_program[(triton.cdiv(width, _SUM_BLOCK), parts)](
        grad, total, rstd, sums, grad.stride(0), total.stride(0), num_rows, width,
        PER_PROGRAM=_SUM_ROWS, ROWS=16, BLOCK=_SUM_BLOCK, num_warps=4,
    )  # fmt: skip
    return sums.sum(0)


def rotate(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `elementwise.rotate`."""
    num_tokens = qkv.shape[0]
    queries = qkv.new_empty(num_tokens, heads.num_query, heads.size)
    keys = qkv.new_empty(num_tokens, heads.num_key_value, heads.size)
    values = torch.empty_like(keys)
    rotate_program[(num_tokens,)](
        qkv, queries, keys, values, cos, sin,
        _or(query_weight, cos), _or(key_weight, cos), qkv.stride(0), cos.stride(0), eps,
        **_describe_heads(heads, cos.shape[1], query_weight, key_weight), num_warps=4,
    )  # fmt: skip
    return queries, keys, values


def _describe_heads(
    heads: Heads, half: int, query_weight: Tensor | None, key_weight: Tensor | None
) -> dict[str, int | bool]:
    """Return the constants of the rotation's programs."""
    norm = 2 if heads.norms_after_rotation else 1
    return {
        "NUM_QUERY": heads.num_query,
        "NUM_KEY": heads.num_key_value,
        "SIZE": heads.size,
        "HALF": half,
        "QUERY_BLOCK": triton.next_power_of_2(heads.num_query),
        "KEY_BLOCK": triton.next_power_of_2(heads.num_key_value),
        "HALF_BLOCK": triton.next_power_of_2(half),
        "VALUE_BLOCK": triton.next_power_of_2(heads.size),
        "INTERLEAVED": heads.is_interleaved,
        "QUERY_NORM": 0 if query_weight is None else norm,
        "KEY_NORM": 0 if key_weight is None else norm,
    }


def rotate_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    qkv: Tensor | None,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    out: Tensor,
    *,
    with_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `elementwise.rotate_backward`."""
    queries, keys, values = (grad.contiguous() for grad in grads)
    before = out if qkv is None else qkv
    sums = torch.empty(2, out.shape[0] if with_weights else 0, heads.size, dtype=torch.float32, device=out.device)
    rotate_backward_program[(out.shape[0],)](
        queries, keys, values, before, out, cos, sin,
        _or(query_weight, cos), _or(key_weight, cos), sums[0], sums[1],
        before.stride(0), out.stride(0), cos.stride(0), eps,
        **_describe_heads(heads, cos.shape[1], query_weight, key_weight), SUM=with_weights, num_warps=4,
    )  # fmt: skip
    return (sums[0].sum(0), sums[1].sum(0)) if with_weights else (sums[0], sums[1])


def gate(
    gate_up: Tensor,
    activation: str,
    out: Tensor,
    quantized: Quantized | None = None,
    dropped: MaskedTensor | None = None,
) -> None:
    """See `elementwise.gate`; with a float8 copy of what goes to `out`."""
    num_tokens, width = out.shape
    copy, copy_stride, key, *numbers = _unfold(dropped, out)
    if quantized is None:
        gate_program[(num_tokens, triton.cdiv(width, _GATE_BLOCK))](
            gate_up, out, copy, key, gate_up.stride(0), out.stride(0), copy_stride, width, *numbers,
            ACTIVATION=activation, DROP=dropped is not None, BLOCK=_GATE_BLOCK, num_warps=4,
        )  # fmt: skip
        return
    gate_rows_program[(num_tokens,)](
        gate_up, out, quantized.values, quantized.scales, copy, key,
        gate_up.stride(0), out.stride(0), copy_stride, width, *numbers,
        ACTIVATION=activation, DROP=dropped is not None, BLOCK=_ROW_BLOCK, num_warps=8,
    )  # fmt: skip


def gate_backward(
    grad: Tensor,
    gate_up: Tensor,
    activation: str,
    out: Tensor,
    quantized: Quantized | None = None,
    side: MaskedTensor | None = None,
) -> None:
    """See `elementwise.gate_backward`; with a float8 copy of what goes to `out`."""
    num_tokens, width = grad.shape
    further, further_stride, key, *numbers = _unfold(side, out)
    if quantized is None:
        gate_backward_program[(num_tokens, triton.cdiv(width, _GATE_BLOCK))](
            grad, gate_up, out, further, key, grad.stride(0), gate_up.stride(0), out.stride(0), further_stride, width,
            *numbers, ACTIVATION=activation, DROP=side is not None, BLOCK=_GATE_BLOCK, num_warps=4,
        )  # fmt: skip
        return
    gate_backward_rows_program[(num_tokens,)](
        grad, gate_up, out, quantized.values, quantized.scales, further, key,
        grad.stride(0), gate_up.stride(0), out.stride(0), further_stride, width, *numbers,
        ACTIVATION=activation, DROP=side is not None, BLOCK=_ROW_BLOCK, num_warps=8,
    )  # fmt: skip


def drop(values: Tensor, dropped: MaskedTensor) -> None:
    """See `elementwise.drop`."""
    num_tokens, width = values.shape
    copy, copy_stride, key, *numbers = _unfold(dropped, values)
    drop_program[(num_tokens, triton.cdiv(width, _GATE_BLOCK))](
        values, copy, key, values.stride(0), copy_stride, width, *numbers, BLOCK=_GATE_BLOCK, num_warps=4
    )


def drop_backward(grad: Tensor, values: Tensor, side: MaskedTensor) -> None:
    """See `elementwise.drop_backward`."""
    num_tokens, width = values.shape
    further, further_stride, key, *numbers = _unfold(side, values)
    drop_backward_program[(num_tokens, triton.cdiv(width, _GATE_BLOCK))](
        grad, values, further, key, grad.stride(0), values.stride(0), further_stride, width, *numbers,
        BLOCK=_GATE_BLOCK, num_warps=4,
    )  # fmt: skip


def cross_entropy(logits: Tensor, targets: Tensor, cap: float | None = None) -> Tensor:
    """See `elementwise.cross_entropy`."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    cross_entropy_program[(logits.shape[0],)](
        logits, targets, losses, logits.stride(0), logits.shape[1], cap or 1.0, CAPS=cap is not None,
        BLOCK=_VOCABULARY_BLOCK, num_warps=16,
    )  # fmt: skip
    return losses


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values [T, H] in float8 (e4m3) and the scale of each row [T, 1] fp32: values ~ float8 * scale."""
    num_rows, width = values.shape
    quantized = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(num_rows, 1, dtype=torch.float32, device=values.device)
    block = min(triton.next_power_of_2(width), 8192)
    quantize_rows_program[(num_rows,)](
        values, quantized, scales, values.stride(0), width, BLOCK=block, num_warps=_count_warps(block)
    )
    return quantized, scales


def copy_matrices(copies: Sequence[Copy]) -> None:
    """Copy matrices in one launch, each times its scale, rounded once; see `adapters.refresh`."""
    source, target = copies[0].source, copies[0].target
    if source.dtype != torch.float32 or target.dtype not in _TRITON_DTYPES:
        for copy in copies:
            copy.target.copy_(copy.source * copy.scale)
        return
    # With sizes and scales: another decoder's matrices may lie where those of one that is gone have lain.
    key = tuple(
        (
            copy.source.data_ptr(), copy.target.data_ptr(), copy.source.numel(), copy.source.shape[1],
            copy.target.stride(0), copy.scale,
        )
        for copy in copies
    )  # fmt: skip
    if key not in _tables:
        scales = torch.tensor([copy.scale for copy in copies], dtype=torch.float32, device=source.device)
        _tables.clear()  # of one decoder at a time
        rows = [row[:-1] for row in key]
        _tables[key] = torch.tensor(rows, device=source.device), scales, max(row[2] for row in rows)
    table, scales, largest = _tables[key]
    copy_matrices_program[(len(copies), triton.cdiv(largest, _COPY_BLOCK))](
        table, scales, TARGET=_TRITON_DTYPES[target.dtype], BLOCK=_COPY_BLOCK, num_warps=4
    )


def _count_warps(block: int) -> int:
    """Return warps a program: 8 elements a thread where rows are wide."""
    return max(4, min(16, block // 512))


def _round_up(width: int) -> int:
    """Return columns of a program that holds a whole row, and draws masks for eight of them at once."""
    return max(COLUMNS_PER_CALL, triton.next_power_of_2(width))


def _unfold(masked: MaskedTensor | None, other: Tensor) -> tuple[Tensor, int, Tensor, int, int, int, float]:
    """Return values, row stride, key, site, first row, threshold and scale; anything where the kernel does not look."""
    if masked is None:
        return other, 0, other, 0, 0, 0, 1.0
    mask = masked.mask
    numbers = mask.site, mask.first_row, mask.threshold, mask.scale
    return masked.values, masked.values.stride(0), mask.key, *numbers


def _side(quantized: Quantized | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return where a float8 copy goes, or any tensors in its place where the kernel does not write it."""
    return (other, other) if quantized is None else quantized


def _or(weight: Tensor | None, other: Tensor) -> Tensor:
    """Return the weight, or any tensor in its place where the kernel does not read it."""
    return other if weight is None else weight
