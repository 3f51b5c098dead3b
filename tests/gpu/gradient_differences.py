"""Tells by how much the fused engine's gradient of each matrix differs from the model's own, on this GPU.

    python -m tests.gpu.gradient_differences [--families NAME ...] [--shapes NAME ...] [--layers N]

The trial at the start of a training compares the gradient as a whole. Here each matrix is compared with its own norm:
small models of every family that the fused engine knows, and real shapes with random weights, in bf16. Of each kind of
matrix the largest and the median difference are printed; the last line is one JSON object with the largest of each
model, and the whole gradient's. The same with FP8 weights, beside the bf16 model's own gradient.
"""

import argparse
import gc
import json
import math
import re
import statistics
from typing import Any

import torch

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.recognition import recognize_decoder
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.loss import cut_trial
from tasks.training.engines.self_check import measure_differences, try_model
from tasks.training.lora import attach_adapter
from tests.benchmarks.random_weights import calm_attention
from tests.benchmarks.shapes import SHAPES
from tests.tasks.decoder.small_models import FAMILIES, build, draw_table

_LENGTHS = (700, 500)
_RANK = 16


def main() -> None:
    """Print the differences of all models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--layers", type=int, help="of the real shapes, in place of all")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    device, largest = torch.device(options.device), dict[str, dict[str, float]]()
    for name in (*options.families, *options.shapes):
        try:
            if name in options.shapes:
                model = make_shape(name, device, options.layers)
            else:
                model = build(name, torch.bfloat16, options.device)
            largest[name] = tell(name, model, device)
        except Exception as error:  # one that does not fit, or has no kernel here: the others are measured
            print(f"\n{name}: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}", flush=True)
        model = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(json.dumps(largest))


def make_shape(name: str, device: torch.device, num_layers: int | None) -> Any:
    """Return a model of a real shape with random weights, and an adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SHAPES[name], **({} if num_layers is None else {"num_hidden_layers": num_layers})}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    attention = {"attn_implementation": "eager"} if name.startswith("gpt-oss") else {}
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **attention)
    calm_attention(model)
    return attach_adapter(model, TrainingConfig(rank=_RANK, alpha=2 * _RANK), seed=0).to(device)


def tell(name: str, model: Any, device: torch.device) -> dict[str, float]:
    """Print a model's differences by kind of matrix, and return the largest: in bf16, and with FP8 weights on a GPU."""
    table, size = draw_table(_LENGTHS), sum(_LENGTHS)
    expected = try_model(model, table, device, torch.bfloat16)
    decoder, largest = recognize_decoder(model), dict[str, float]()
    for weights in ("bf16", "fp8") if device.type == "cuda" else ("bf16",):
        if weights == "fp8":
            decoder = quantize_decoder(decoder)
        engine = FusedEngine(decoder, device, size, 0, LOGITS_BYTES, size)
        found = measure_differences(model, engine, cut_trial(table, count=2), expected)
        whole = math.hypot(*(difference for difference, _ in found.grads.values()))
        norm = math.hypot(*(norm for _, norm in found.grads.values()))
        print(
            f"\n{name}, {weights}: loss off by {found.loss:.2g}, the whole gradient by {whole / norm:.4f}", flush=True
        )
        kinds: dict[str, list[float]] = {}
        for matrix, (difference, own) in found.grads.items():
            short = re.sub(r"^.*layers\.\d+\.", "", matrix).removesuffix(".default.weight")
            kinds.setdefault(short, []).append(difference / max(own, 1e-30))
        for kind, values in sorted(kinds.items(), key=lambda item: -max(item[1])):
            middle = statistics.median(values)
            print(f"  {max(values):8.4f} at most, {middle:8.4f} median, {len(values):4} of {kind}", flush=True)
        largest |= {
            f"{weights} whole": whole / norm,
            f"{weights} matrix": max(max(values) for values in kinds.values()),
        }
    return largest


if __name__ == "__main__":
    main()
