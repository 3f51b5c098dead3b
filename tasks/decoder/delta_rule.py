"""The gated delta rule of examples that lie end to end, each alone with itself (Yang, Kautz and Hatamizadeh, 2025).

A head has a state S [K, V] that starts at zero with each example; for each token

    S <- a S + b k (v - (a S)' k)'        o = S' q / sqrt(K)

with k and q of length one, 0 < a <= 1 its decay and b what it takes over of the new value.

Dimensions: `T` tokens, `Q` heads of keys, `V` heads of values (each key head serves V / Q of them), `K` and `D` their
sizes, `C` tokens of a chunk, `N` chunks.
"""

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from tasks.decoder.attention import Segments

_CHUNK = 64
_LENGTH_EPS = 1e-6
_FLA_DTYPES = (torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


class DeltaRule(Protocol):
    """The gated delta rule within each segment."""

    def __call__(
        self, queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments
    ) -> Tensor:
        """Return [T, V, D] in the dtype of the queries.

        Args:
            queries: [T, Q, K], of any length but zero.
            keys: likewise.
            values: [T, V, D]
            log_decay: [T, V] fp32, log a.
            beta: [T, V] fp32
            segments: end to end, all of T.
        """
        ...


def find_delta_rules(device: torch.device, dtype: torch.dtype) -> tuple[DeltaRule, ...]:
    """Return the ways to compute it that there are for a device and a dtype, the fastest first."""
    if device.type == "cuda" and dtype in _FLA_DTYPES and _find_fla() is not None:
        return run_fla_rule, run_plain_rule
    return (run_plain_rule,)


def name_delta_rule(rule: DeltaRule) -> str:
    """Return what people call it."""
    return "flash-linear-attention" if rule is run_fla_rule else "the delta rule in plain PyTorch"


def run_fla_rule(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments
) -> Tensor:
    """Run the kernels of flash-linear-attention.

    Queries and keys come to it of length one: its own kernel for that tries its forms anew for every few thousand
    tokens more, for seconds each.
    """
    from tasks.decoder import kernels

    function = _find_fla()
    assert function is not None
    outputs, _ = function(
        UnitLength.apply(queries, kernels)[None],
        UnitLength.apply(keys, kernels)[None],
        values[None],
        g=log_decay[None],
        beta=beta[None],
        scale=queries.shape[-1] ** -0.5,
        cu_seqlens=segments.wide_borders,
        cu_seqlens_cpu=segments.host_borders,
    )
    result: Tensor = outputs[0]
    return result


class UnitLength(torch.autograd.Function):
    """x [T, heads, K] over its length, the root of the sum of squares: the RMS norm of a factor of 1 / sqrt(K)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, ops: ModuleType) -> Tensor:
        """Return [T, heads, K], by the norm of `elementwise` or `kernels`."""
        size = states.shape[-1]
        rows = states.reshape(-1, size)
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        wide = torch.promote_types(states.dtype, torch.float32)
        factor = torch.full((size,), size**-0.5, dtype=wide, device=states.device)
        total, rstd = ops.add_norm(rows, None, factor, _LENGTH_EPS / size, out)
        ctx.save_for_backward(total, rstd, factor)
        ctx.ops = ops
        return out.view(states.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        total, rstd, factor = ctx.saved_tensors
        out = torch.empty_like(total, memory_format=torch.contiguous_format)
        ctx.ops.norm_backward(grads[0].reshape(total.shape), total, rstd, factor, None, out)
        return out.view(grads[0].shape), None


@cache
def _find_fla() -> Any | None:
    """Return the chunked rule of flash-linear-attention; None where it does not import, or is not sound."""
    if find_spec("fla") is not None and _is_miscompiled(torch.cuda.get_device_capability(), _read_triton_version()):
        logger.warning(
            "flash-linear-attention is not used: Triton 3.4 to 3.7.0 compiles its backward pass wrongly for Hopper "
            "GPUs. The delta rule runs in plain PyTorch, which is slower. Triton 3.7.1 or later, or tilelang "
            "(pip install tilelang), changes that"
        )
        return None
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except Exception as error:  # it looks for a device and a compiler while it imports, and raises what it likes
        if not isinstance(error, ModuleNotFoundError):
            logger.warning("flash-linear-attention is installed but does not import (%s)", error)
        return None
    return chunk_gated_delta_rule


def _read_triton_version() -> tuple[int, ...]:
    """Return the release of Triton that is installed, as numbers; nothing without it."""
    try:
        release = version("triton").partition("+")[0]
    except PackageNotFoundError:
        return ()
    return tuple(int(number) for number in release.split(".")[:3] if number.isdigit())


def _is_miscompiled(capability: tuple[int, int], triton: tuple[int, ...]) -> bool:
    """Say whether Triton compiles the backward pass of flash-linear-attention wrongly, and nothing stands in for it.

    The library found it out (its issue 640), and raises in the middle of the backward pass.
    """
    return capability[0] == 9 and (3, 4) <= triton < (3, 7, 1) and find_spec("tilelang") is None


def run_plain_rule(
    queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments
) -> Tensor:
    """Run the chunked form in plain PyTorch, in fp32 or wider: exact on any device."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    spread = _Chunks(segments, min(_CHUNK, segments.longest), queries.device)
    groups = values.shape[1] // queries.shape[1]
    query, key, value, decay, rate = (
        spread.cut(states.to(dtype)) for states in (queries, keys, values, log_decay[..., None], beta[..., None])
    )
    query, key = (_to_length_one(states).repeat_interleave(groups, dim=1) for states in (query, key))
    query = query * queries.shape[-1] ** -0.5
    summed = decay.cumsum(dim=2)
    before = torch.ones(spread.size, spread.size, dtype=torch.bool, device=queries.device).tril()
    between = (summed - summed.transpose(-1, -2)).masked_fill(~before, float("-inf")).exp()
    # (I + A) x = b for each chunk: what its tokens write, given the state before it.
    system = (rate * key) @ key.transpose(-1, -2) * between
    solve = torch.linalg.solve_triangular
    written = solve(system, rate * value, upper=False, unitriangular=True)
    read = solve(system, rate * key * summed.exp(), upper=False, unitriangular=True)
    inside = query @ key.transpose(-1, -2) * between
    last = summed[:, :, -1:]
    query, key, fade = query * summed.exp(), key * (last - summed).exp(), last.exp()
    results = []
    state = query.new_zeros(spread.counts[0], value.shape[1], key.shape[-1], value.shape[-1])
    for chunks in spread.ranks:  # the first chunk of every segment, then the second of those that have one, …
        state = state[: chunks.stop - chunks.start]
        new = written[chunks] - read[chunks] @ state
        results.append(query[chunks] @ state + inside[chunks] @ new)
        state = state * fade[chunks] + key[chunks].transpose(-1, -2) @ new
    return spread.join(torch.cat(results)).to(queries.dtype)


def _to_length_one(states: Tensor) -> Tensor:
    return states * torch.rsqrt(states.square().sum(-1, keepdim=True) + _LENGTH_EPS)


class _Chunks:
    """Cuts tokens end to end into chunks of one segment each, and lays what comes of them end to end again.

    The first chunks of all segments come first, longer segments before shorter ones, then the second chunks, and so on.
    """

    def __init__(self, segments: Segments, size: int, device: torch.device) -> None:
        self.size = size
        lengths = torch.tensor(segments.lengths)
        starts = lengths.cumsum(0) - lengths
        order = lengths.argsort(descending=True, stable=True)
        order = order[lengths[order] > 0]
        num_ranks = -(-int(lengths.max()) // size)
        rows = [(int((lengths > rank * size).sum()), rank) for rank in range(num_ranks)]
        self.counts = [count for count, _ in rows]
        ends = [sum(self.counts[: rank + 1]) for rank in range(num_ranks)]
        self.ranks = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        # A place that no token fills reads the row of zeros behind the last token.
        total = int(lengths.sum())
        offsets = torch.arange(size)
        places = []
        for count, rank in rows:
            chosen = order[:count]
            inner = rank * size + offsets[None]
            places.append(torch.where(inner < lengths[chosen, None], starts[chosen, None] + inner, total))
        joined = torch.cat(places).flatten()
        found = (joined < total).nonzero()[:, 0]
        back = torch.empty(total, dtype=torch.int64).index_copy_(0, joined[found], found)
        self.places, self.back = joined.to(device), back.to(device)

    def cut(self, states: Tensor) -> Tensor:
        """Cut [T, heads, D] into [N, heads, C, D]."""
        filled = F.pad(states, (0, 0, 0, 0, 0, 1))
        return filled.index_select(0, self.places).unflatten(0, (-1, self.size)).transpose(1, 2)

    def join(self, chunks: Tensor) -> Tensor:
        """Lay [N, heads, C, D] end to end, as [T, heads, D]."""
        return chunks.transpose(1, 2).flatten(0, 1).index_select(0, self.back)
