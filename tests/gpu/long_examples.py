"""Tells what a token of a long example takes on this GPU, and what the two ways to spare memory cost.

    python -m tests.gpu.long_examples [--shape llama3-8b] [--layers 4] [--tokens 131072 262144]

A few layers of a real shape's width with random weights, LoRA on every linear layer, one example a pass, every layer
recomputed. Each pass is done whole, with its gated layers in pieces, with its layers' inputs in the host's memory, and
with both. Printed are a token's bytes at the peak: those of all layers' inputs on the device, and the rest, which is a
layer's work and what all layers share; the seconds of a forward and backward pass; by how much the gradient differs
from the whole pass's; and the longest example of the shape with all its layers that this would leave room for.
"""

import argparse
import gc
import json
import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.host_inputs import HostMemory
from tasks.decoder.pieces import PIECE_TOKENS
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import Batch, form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import attach_adapter, collect_trained
from tests.benchmarks.shapes import SHAPES
from tests.tasks.decoder.small_models import draw_table

_RANK = 16
_SHARE = 0.9
_WAYS = {
    "whole": (0, False),
    "pieces": (PIECE_TOKENS, False),
    "host": (0, True),
    "pieces and host": (PIECE_TOKENS, True),
}


class Found(NamedTuple):
    """What a pass took."""

    peak_bytes: int
    seconds: float
    loss: float
    grads: torch.Tensor
    host_bytes: int


def main() -> None:
    """Measure all passes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama3-8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="*", default=[131072, 262144])
    options = parser.parse_args()
    engine, grads = build_engine(options.shape, options.layers)
    # In bf16: the layers' weights that are missing here, beside those that are there.
    rest = (SHAPES[options.shape]["num_hidden_layers"] - options.layers) * engine.decoder.layers[0].num_weights * 2
    run_pass(engine, make_batch(1024), grads)  # compiles the kernels
    rows = []
    for tokens in options.tokens:
        batch, whole = make_batch(tokens), None
        for way in _WAYS:
            try:
                found = measure(engine, batch, grads, way, warms_up=tokens <= 131072)
            except torch.OutOfMemoryError:
                print(f"{tokens:8,} tokens, {way}: does not fit", flush=True)
                continue
            whole = whole or found
            rows.append(tell(options, way, tokens, found, whole, rest))
    print(json.dumps(rows))


def build_engine(shape: str, num_layers: int, *, binds: bool = True) -> tuple[FusedEngine, torch.Tensor]:
    """Return the engine of a few layers, all recomputed, and the vector to which passes add their gradients.

    Without it (`binds` false) gradients are new ones in each pass, as when a training measures its memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {**SHAPES[shape], "num_hidden_layers": num_layers}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes, max_position_embeddings=1 << 21)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    adapted = attach_adapter(model, TrainingConfig(rank=_RANK, alpha=2 * _RANK), seed=0)
    for parameter in collect_trained(adapted).values():
        parameter.data = 0.02 * torch.randn_like(parameter)
    engine = FusedEngine(
        recognize_decoder(adapted), torch.device("cuda"), 1 << 20, num_layers, LOGITS_BYTES // 4, 1 << 20
    )
    grads = engine.bind_gradients() if binds else torch.zeros(1, device="cuda")
    assert grads is not None
    return engine, grads


def make_batch(num_tokens: int) -> Batch:
    """Return a batch of one example, its second half trained."""
    return form_flat_batch(draw_table([num_tokens]), range(1))


def run_pass(engine: FusedEngine, batch: Batch, grads: torch.Tensor) -> float:
    """Do a forward and backward pass, and return the mean loss."""
    grads.zero_()
    loss = engine.sum_losses(batch) / batch.input_ids.shape[1]
    loss.backward()
    return float(loss.detach())


def measure(engine: FusedEngine, batch: Batch, grads: torch.Tensor, way: str, *, warms_up: bool = True) -> Found:
    """Return what a pass takes."""
    piece_tokens, in_host = _WAYS[way]
    host = HostMemory(engine.device) if in_host else None
    num_in_host = engine.num_layers - 1 if in_host else 0
    engine = replace(engine, piece_tokens=piece_tokens, host=host, num_in_host=num_in_host)
    gc.collect()
    torch.cuda.empty_cache()
    if warms_up or in_host:  # the first pass allocates the host's memory
        run_pass(engine, batch, grads)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = run_pass(engine, batch, grads)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() - before
    return Found(peak, seconds, loss, grads.clone(), 0 if host is None else host.held_bytes)


def tell(options: argparse.Namespace, way: str, tokens: int, found: Found, whole: Found, rest: int) -> dict[str, Any]:
    """Print a line, and return its numbers."""
    sizes = SHAPES[options.shape]
    an_input = 2 * sizes["hidden_size"]
    # In the host lie all but the last layer's, and one more is on its way.
    on_device = 2 if _WAYS[way][1] else options.layers
    a_token = found.peak_bytes / tokens
    work = a_token - on_device * an_input
    of_all = work + (2 if _WAYS[way][1] else sizes["num_hidden_layers"]) * an_input
    free = _SHARE * torch.cuda.get_device_properties(0).total_memory - torch.cuda.memory_allocated() - rest
    difference = float((found.grads - whole.grads).norm() / whole.grads.norm())
    longest = int(free / of_all)
    print(
        f"{tokens:8,} tokens, {way:15}: {a_token / 2**20:.3f} MiB a token at the peak: {work / 2**20:.3f} beside "
        f"{on_device} inputs of {an_input / 2**20:.4f}; {found.seconds:.2f} s; gradient differs by {difference:.1e}"
        f"{' (bit for bit the same)' if torch.equal(found.grads, whole.grads) else ''}, loss by "
        f"{found.loss - whole.loss:.1e}; host {found.host_bytes / 2**30:.1f} GiB; with all "
        f"{sizes['num_hidden_layers']} layers {of_all / 2**20:.3f} MiB a token, {longest:,} tokens",
        flush=True,
    )
    return {
        "tokens": tokens,
        "way": way,
        "peak_bytes": found.peak_bytes,
        "work_bytes_per_token": work,
        "seconds": found.seconds,
        "difference": difference,
        "longest": longest,
    }


if __name__ == "__main__":
    main()
