"""`python -m tests.tasks.decoder.lowering`: every Triton program that decoders launch, for a GPU that is not there.

The interpreter runs programs as Python and takes what the compiler refuses: a name that changes its shape in a loop.
Here the compiler's first step, which checks every name and type, sees each program with the arguments that it is
launched with; nothing is launched, so that results are whatever lies in memory.
"""

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tasks import decoder as package
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.elementwise import Quantized
from tasks.decoder.expert_elementwise import Gate
from tasks.decoder.grouped import ExpertPart, build_grouped_projection
from tasks.decoder.quantized_experts import quantize_experts
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tests.tasks.decoder import small_models, test_own_weights

_TARGET = GPUTarget("cuda", 90, 32)
_FAMILIES = (
    *("llama", "qwen3", "gemma3_text", "granite", "phi3", "glm4", "hunyuan_v1_dense", "olmo3", "gemma4_text"),
    *("qwen3_5_text", "qwen3_moe", "gpt_oss", "deepseek_v3", "youtu", "gemma4_moe"),
)
_DROPPING = ("qwen3", "gemma3_text", "qwen3_5_text", "phi3")
_OWN = ("qwen3", "olmo3", "hunyuan_v1_dense")


class _Absent:
    """Stands for the driver of a GPU."""

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """Lower all programs; exit if one was never launched."""
    lowered: set[str] = set()

    seen: set[tuple[int, Any]] = set()

    def lower(
        program: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any
    ) -> None:
        if (id(program), key) in seen:
            return
        seen.add((id(program), key))
        backend, context = make_backend(_TARGET), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(program, signature, constants, attributes)
        codegen = backend.get_codegen_implementation(options)
        source.make_ir(_TARGET, options, codegen, backend.get_module_map(), context)
        lowered.add(program.fn.__name__)

    driver.set_active(_Absent())
    JITFunction._do_compile = lower
    for family in _FAMILIES:
        run(small_models.build(family, torch.bfloat16))
    for family in _DROPPING:
        run(small_models.build(family, torch.bfloat16, dropout=0.1))
    for family in _OWN:
        run(test_own_weights.build(family), torch.bfloat16)
    run_float8()
    run_others()
    missing = sorted(list_programs() - lowered)
    if missing:
        sys.exit(f"never launched: {', '.join(missing)}")


def list_programs() -> set[str]:
    """Return the names of all programs that are launched."""
    names = set()
    for file in Path(package.__file__).parent.glob("*.py"):
        if file.stem.endswith(("programs", "kernels")):
            found = vars(import_module(f"tasks.decoder.{file.stem}"))
            names |= {
                name for name, value in found.items() if isinstance(value, JITFunction) and name.endswith("program")
            }
    return names


def run(model: Any, dtype: torch.dtype | None = None) -> None:
    """Go through a decoder of kernels, there and back."""
    from tasks.decoder import kernels

    batch = form_flat_batch(small_models.draw_table(), [0, 1, 2])
    decoder = replace(recognize_decoder(model, dtype), ops=kernels)
    engine = FusedEngine(decoder, torch.device("cpu"), 4096, 1, LOGITS_BYTES, 4096)
    if dtype is not None:
        engine.bind_gradients()
    if engine.replay_gradient(batch, 0.25) is None:
        engine.sum_losses(batch).backward()


def run_others() -> None:
    """Launch what stands in for PyTorch's own on a GPU alone."""
    from tasks.decoder import causal_softmax_kernels, copy_kernels, lane_kernels

    room = torch.zeros(3, 80, dtype=torch.bfloat16)
    copy_kernels.copy_rows(torch.randn(3, 64, dtype=torch.bfloat16), room[:, :64])
    scores, sums = torch.randn(2, 12, 6), torch.zeros(2, 12)
    causal_softmax_kernels.causal_softmax(scores, 0.5, torch.bfloat16)
    causal_softmax_kernels.causal_softmax_backward(scores, scores, sums, sums, 0.5, torch.bfloat16)
    ends, thin = torch.tensor([1, 3], dtype=torch.int32), torch.randn(3, 16, dtype=torch.bfloat16)
    lane_kernels.add_thin(room, thin, torch.randn(2, 16, 80, dtype=torch.bfloat16), ends, 2)
    for is_turned in (False, True):
        table = lane_kernels.tabulate([torch.zeros(16, 80)] * 2, (0, 0), (16, 16))
        lane_kernels.add_outer(thin, room, ends, table, torch.ones(2), (16, 16), is_turned=is_turned)


def run_float8() -> None:
    """Launch what makes float8 copies, and the products of experts; no CPU has the others."""
    from tasks.decoder import kernels

    gate_up, grad = torch.randn(3, 96, dtype=torch.bfloat16), torch.randn(3, 48, dtype=torch.bfloat16)
    narrow, wide = (Quantized(torch.zeros(3, width).to(torch.float8_e4m3fn), torch.zeros(3, 1)) for width in (48, 96))
    kernels.gate(gate_up, "silu", torch.empty_like(grad), narrow)
    kernels.gate_backward(grad, gate_up, "silu", torch.empty_like(gate_up), wide)
    kernels.quantize_rows(gate_up)
    run_float8_experts(grad, gate_up)


def run_float8_experts(narrow: Tensor, wide: Tensor) -> None:
    """Launch what two experts in float8 do with rows [3, 48] and [3, 96]."""
    from tasks.decoder import expert_float8_kernels, expert_kernels

    ends, tokens = torch.tensor([1, 3], dtype=torch.int32), torch.arange(3)
    for has_adapter in (False, True):
        lora_a, lora_b = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((16, 96), (48, 16)))
        weight = torch.nn.Parameter(torch.randn(2, 48, 96, dtype=torch.bfloat16), requires_grad=False)
        expert_float8_kernels.quantize_matrices(weight.data)
        part = ExpertPart(weight, None, lora_a if has_adapter else None, lora_b if has_adapter else None, 1.0)
        projection = replace(quantize_experts(build_grouped_projection(part)), ops=expert_float8_kernels)
        projection.forward_tokens(wide, tokens, ends, expert_kernels)
        projection.backward_tokens(narrow, tokens, ends, expert_kernels)
        rows = projection.allocate_input(3, ends)
        expert_kernels.gate_weighted(torch.cat([wide, wide], 1), narrow[:, 0], Gate("silu"), rows.values, rows.float8)
        projection.forward(rows, projection.project_small(rows, ends, None), ends)
        rows = projection.allocate_grad(3, ends)
        halves = narrow[:, :24].contiguous()
        expert_kernels.gate_weighted_backward(halves, narrow, narrow[:, 0], Gate("silu"), rows.values, rows.float8)
        projection.backward(rows, ends, needs_input=True)


if __name__ == "__main__":
    main()
