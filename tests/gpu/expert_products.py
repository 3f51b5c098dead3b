"""Times the products of routed experts in bf16 and in float8 on this GPU, at real sizes, and a whole layer's kernels.

    python -m tests.gpu.expert_products [--only products|layers] [--shape qwen3-30b-a3b gpt-oss-20b]

The first part times what a product is made of, with several ways of cutting it into tiles, beside PyTorch's own grouped
products, and compares each with products in fp32. The second times passes through a few layers of a model, forward,
again, and backward, and lists the kernels that take the most time.
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]
from torch.nn import functional as F  # noqa: N812 (the name that everybody reads)

from schemas.config import TrainingConfig
from tasks.decoder import expert_float8
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.experts import Order, sort_rows
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import attach_adapter
from tests.benchmarks.shapes import SHAPES
from tests.tasks.decoder.small_models import draw_table

_TOKENS = 16384
_RANK = 16
_LENGTH = 350
_NUM_LAYERS = 4
_REPEATS = 10
# experts, chosen, hidden, intermediate
_SIZES = {"qwen3-30b-a3b": (128, 8, 2048, 768), "gpt-oss-20b": (32, 4, 2880, 2880)}
_TILES = [
    (128, 128, 128, 4, 3),
    (128, 128, 128, 4, 4),
    (128, 128, 128, 8, 3),
    (128, 256, 128, 8, 3),
    (128, 256, 64, 8, 4),
    (64, 256, 128, 4, 3),
    (128, 128, 64, 4, 5),
]


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("products", "layers"))
    parser.add_argument("--shape", nargs="+", default=list(_SIZES))
    options = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for shape in options.shape:
        if options.only != "layers":
            time_products(shape)
        if options.only != "products":
            for is_quantized in (False, True):
                time_layers(shape, is_quantized=is_quantized)
                gc.collect()
                torch.cuda.empty_cache()


def time_products(shape: str) -> None:
    """Time both products of a layer's experts, each way."""
    num_experts, num_chosen, hidden, intermediate = _SIZES[shape]
    chosen = torch.rand(_TOKENS, num_experts, device="cuda").topk(num_chosen).indices
    order = sort_rows(chosen, num_experts)
    for name, width, num_outputs in (
        ("gate_up", hidden, 2 * intermediate),
        ("down", intermediate, hidden),
        ("of gate_up's input", 2 * intermediate, hidden),
        ("of down's input", hidden, intermediate),
    ):
        print(f"\n{shape}, {name}: {len(order.tokens)} rows of {width}, {num_outputs} outputs", flush=True)
        _time_product(num_experts, width, num_outputs, order, is_backward=name.startswith("of"))


@dataclass(frozen=True)
class _Product:
    """A product of routed experts, with its adapter's."""

    order: Order
    rows: Tensor
    """[R, in]"""
    weights: Tensor
    """[experts, out, in]"""
    small: Tensor
    """[R, rank]"""
    further: Tensor
    """[experts, out, rank]"""
    exact: Tensor
    """Some rows of the result, evenly spaced, in fp32."""

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is added within a product in float8, and the ends of the experts' rows."""
        return self.small, self.further, self.order.ends

    def tell(self, name: str, call: Callable[[], Any], *, is_product: bool = True) -> Any:
        """Time a call and print it, of a product its rate and how far it is off; return what it gives."""
        try:
            result, seconds = call(), _time(call)
        except Exception as error:  # whatever a kernel that does not compile here raises
            print(f"  {name:44} fails: {type(error).__name__}: {str(error).partition(chr(10))[0][:150]}", flush=True)
            return None
        rate = off = ""
        if is_product:
            num_rows, num_exact = len(self.rows), len(self.exact)
            flop = 2.0 * num_rows * self.weights[0].numel()
            rate = f"{flop / seconds / 1e12:7.0f} TFLOP/s"
            picked = result[:: max(1, num_rows // num_exact)][:num_exact].float()
            off = f", off by {float((picked - self.exact).norm() / self.exact.norm()):.4f}"
        print(f"  {name:44} {seconds * 1e3:7.3f} ms {rate}{off}", flush=True)
        return result


def _time_product(num_experts: int, width: int, num_outputs: int, order: Order, *, is_backward: bool) -> None:
    from tasks.decoder import expert_float8_kernels as kernels

    num_rows = len(order.tokens)
    rows = torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(num_experts, num_outputs, width, device="cuda", dtype=torch.bfloat16) * 0.02
    small = torch.randn(num_rows, _RANK, device="cuda", dtype=torch.bfloat16)
    further = torch.randn(num_experts, num_outputs, _RANK, device="cuda", dtype=torch.bfloat16) * 0.02
    joint, matrices = torch.cat([rows, small], 1), torch.cat([weights, further], 2)
    product = _Product(order, rows, weights, small, further, _multiply_exactly(joint, matrices, order.ends))
    turned = matrices.mT.contiguous().mT if is_backward else matrices  # as the joint matrices lie
    product.tell("bf16, F.grouped_mm, adapter within", lambda: F.grouped_mm(joint, turned.mT, offs=order.ends))
    scaled = kernels.quantize_matrices(weights)
    _time_float8(product, _time_quantization(product, scaled), scaled)
    _time_gathered(product, scaled)


def _time_quantization(product: _Product, scaled: Any) -> Any:
    """Time the ways to float8, and return the rows in it."""
    from tasks.decoder import expert_float8_kernels as kernels

    rows, weights, ends = product.rows, product.weights, product.order.ends
    quantized = product.tell("rows to float8", lambda: kernels.quantize_expert_rows(rows, None, ends), is_product=False)
    product.tell(
        "rows to float8, with factors",
        lambda: kernels.quantize_expert_rows(rows, torch.ones(len(weights), rows.shape[1], device="cuda"), ends),
        is_product=False,
    )
    product.tell("matrices to float8", lambda: kernels.quantize_matrices(weights), is_product=False)
    product.tell("matrices turned", lambda: kernels.turn_matrices(scaled.values), is_product=False)
    plain = expert_float8.quantize_expert_rows(rows, None, ends)
    same = (plain.values.view(torch.uint8) == quantized.values.view(torch.uint8)).float().mean()
    print(f"  {float(same):.6f} of the float8 numbers are those of plain PyTorch", flush=True)
    return quantized


def _time_float8(product: _Product, quantized: Any, scaled: Any) -> None:
    """Time the product in float8, with its adapter's within and without, and the adapter's alone."""
    from tasks.decoder import expert_float8_kernels as kernels
    from tests.gpu.described_programs import multiply_described

    small, further, ends = product.given
    given = quantized, scaled.values, scaled.scales, *product.given
    for tiles in _TILES:
        way = partial(kernels.multiply_quantized, *given, tiles=kernels.Tiles(*tiles))
        product.tell(f"float8, Triton, adapter within, {tiles}", way)
    for tiles in _TILES[:5]:
        way = partial(multiply_described, *given, tiles=kernels.Tiles(*tiles))
        product.tell(f"float8, Triton with TMA, {tiles}", way)
    none, nothing = small[:, :0], further[:, :, :0]
    product.tell(
        "float8, Triton, no adapter",
        lambda: kernels.multiply_quantized(quantized, scaled.values, scaled.scales, none, nothing, ends),
    )
    product.tell(
        "float8, torch._scaled_grouped_mm, no adapter",
        lambda: torch._scaled_grouped_mm(
            quantized.values, scaled.values.mT, quantized.scales, scaled.scales, offs=ends, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    )  # fmt: skip
    product.tell("adapter's own product, bf16, F.grouped_mm", lambda: F.grouped_mm(small, further.mT, offs=ends))


def _time_gathered(product: _Product, scaled: Any) -> None:
    """Time small and outer products, and what gathers the tokens' rows within a product."""
    from tasks.decoder import expert_float8_kernels as kernels
    from tasks.decoder.expert_kernels import gather_rows, multiply_outer
    from tests.gpu.described_programs import multiply_described

    rows, small, order, ends = product.rows, product.small, product.order, product.order.ends
    tell = partial(product.tell, is_product=False)
    inner = torch.randn(len(product.weights), _RANK, rows.shape[1], device="cuda", dtype=torch.bfloat16)
    tell("small product, bf16, F.grouped_mm", lambda: F.grouped_mm(rows, inner.mT, offs=ends))
    tokens = rows[:_TOKENS].contiguous()
    of_tokens = kernels.quantize_expert_rows(tokens, None, ends)
    gathered = of_tokens, scaled.values, scaled.scales, *product.given, order.tokens
    for tiles in _TILES[:5]:
        kind = kernels.Tiles(*tiles)
        tell(f"float8, Triton, rows gathered, {tiles}", partial(kernels.multiply_quantized, *gathered, tiles=kind))
        tell(f"float8, Triton with TMA, rows gathered, {tiles}", partial(multiply_described, *gathered, tiles=kind))
    tell("small product, rows gathered", lambda: kernels.project_rows(tokens, order.tokens, inner, ends))
    tell("rows gathered", lambda: gather_rows(tokens, order.tokens, rows))
    tell("outer product, rows gathered", lambda: multiply_outer(small, tokens, ends, order.tokens))
    tell("outer product", lambda: multiply_outer(small, rows, ends))


def _multiply_exactly(joint: Tensor, matrices: Tensor, ends: Tensor, *, most_rows: int = 512) -> Tensor:
    """Return some rows, evenly spaced, times the transpose of their expert's matrix, in fp32."""
    step = max(1, len(joint) // most_rows)
    picked = torch.arange(0, len(joint), step, device=joint.device)[:most_rows]
    experts = torch.searchsorted(ends, picked.to(torch.int32), right=True)
    return torch.stack(
        [matrices[expert].float() @ joint[row].float() for row, expert in zip(picked, experts, strict=True)]
    )


def _time(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call on the device."""
    seconds = []
    for number in range(_REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(seconds)


def time_layers(shape: str, *, is_quantized: bool) -> None:
    """Time passes through a few layers whose layers all run again, and list their kernels."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SHAPES[shape], "num_hidden_layers": _NUM_LAYERS}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapted = attach_adapter(model, TrainingConfig(rank=_RANK, alpha=2 * _RANK), seed=0)
    decoder = recognize_decoder(adapted)
    before = torch.cuda.memory_allocated()
    if is_quantized:
        decoder = quantize_decoder(decoder)
    weights = torch.cuda.memory_allocated()
    engine = FusedEngine(decoder, torch.device("cuda"), _TOKENS, _NUM_LAYERS, LOGITS_BYTES, _TOKENS)
    engine.bind_gradients()
    table = draw_table([_LENGTH] * (_TOKENS // _LENGTH))
    batch = form_flat_batch(table, range(_TOKENS // _LENGTH))

    def run() -> None:
        engine.sum_losses(batch).backward()

    torch.cuda.reset_peak_memory_stats()
    seconds = _time(run)
    peak = torch.cuda.max_memory_allocated()
    kind = "float8" if is_quantized else "bf16"
    print(
        f"\n{shape}, {_NUM_LAYERS} layers, {kind}: {seconds * 1e3:.1f} ms for a pass of "
        f"{_TOKENS} tokens; weights {before / 2**30:.2f} GiB, then {weights / 2**30:.2f}, peak {peak / 2**30:.2f}",
        flush=True,
    )
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    rows: dict[str, tuple[float, int]] = {}
    for event in profile.key_averages():
        if event.device_type == DeviceType.CUDA:
            rows[event.key] = event.self_device_time_total, event.count
    whole = sum(time for time, _ in rows.values())
    print(f"  kernels together {whole / 1e3:.1f} ms", flush=True)
    for name, (time, count) in sorted(rows.items(), key=lambda row: -row[1][0])[:28]:
        print(f"  {time / 1e3:8.2f} ms {count:5} x  {name[:110]}", flush=True)


if __name__ == "__main__":
    main()
