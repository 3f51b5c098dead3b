"""Training speed and memory of the general engine on one GPU, without servers, files or tracking.

    python tests/benchmarks/general_engine.py [--shape qwen2.5-7b] [--steps 30] [--layers N] [--set NAME=VALUE …]

The model has random weights in a real shape and the rows have the lengths of `trainers.draw_lengths`; the steps are the
product's own, with its defaults but for the engine. It wants torch, transformers, peft and pydantic, nothing of the
pipeline around. The last line is one JSON object.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
# What the product sets itself, see `tasks.training.process.ahead`.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from tests.benchmarks import shapes, trainers  # noqa: E402 (the file is run by its path)

SHAPES: dict[str, dict[str, Any]] = {
    **shapes.SHAPES,
    "tiny": {
        "model_type": "olmo2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="in place of the shape's")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=trainers.NUM_ROWS, help="of the drawn ones")
    parser.add_argument(
        "--set", nargs="*", default=[], help="settings of training, such as dropout=0.05 or engine=auto"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    stand_in_for_pyarrow()
    settings = {
        name: json.loads(value) if value[:1] in "0123456789[tfn" else value for name, value in split(options.set)
    }
    result = run(options.shape, options.layers, options.rows, options.steps, {"engine": "general", **settings})
    print(json.dumps(result))


def split(pairs: list[str]) -> list[tuple[str, str]]:
    """Return the names and values of NAME=VALUE."""
    return [(name, value) for name, _, value in (pair.partition("=") for pair in pairs)]


def stand_in_for_pyarrow() -> None:
    """Let the product's modules be imported where pyarrow is missing: nothing is read from files here."""
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        from unittest.mock import MagicMock

        for name in ("pyarrow", "pyarrow.parquet"):
            sys.modules[name] = MagicMock(spec=ModuleType(name), __spec__=None, schema=MagicMock())


def run(shape: str, layers: int | None, num_rows: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Prepare a training as the product does, and do its steps."""
    import torch

    from schemas.config import TrainingConfig
    from tasks.models import choose_device
    from tasks.training.checkpoints import Progress
    from tasks.training.memory import read_memory
    from tasks.training.steps import Run, do_step, iterate

    device = choose_device()
    config = TrainingConfig(**settings, max_steps=steps, num_epochs=1000)
    started = time.perf_counter()
    setup = prepare(
        build_model(shape, layers, device), draw_table(num_rows, SHAPES[shape]["vocab_size"]), config, steps
    )
    prepared = time.perf_counter()
    print(f"{setup.engine.describe()} (chosen in {prepared - started:.1f} s)", flush=True)
    training = Run(setup, Progress(), "benchmark")
    batches = iterate(training)
    times, tokens, peak = [prepared], [], read_memory(device)
    for _ in range(steps):
        record, batches = do_step(training, batches)
        peak = max(peak, record.memory_bytes)
        times.append(time.perf_counter())
        tokens.append(record.num_tokens)
        print(f"step {record.step}: {record.num_tokens} tokens, {times[-1] - times[-2]:.3f} s, loss {record.loss:.3f}")
    skipped = max(1, steps // 4)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": shape,
        "tokens_per_second": round(sum(tokens[skipped:]) / (times[-1] - times[skipped])),
        "peak_gib": round(peak / 2**30, 1),
        "engine": training.setup.engine.describe(),
        "num_recomputed": getattr(training.setup.engine, "num_recomputed", 0),
        "tokens_per_forward": getattr(training.setup.engine, "tokens_per_forward", 0),
        "tokens_per_step": round(sum(tokens) / len(tokens)),
        "setup_seconds": round(prepared - started, 1),
        "first_step_seconds": round(times[1] - times[0], 1),
        "notes": [*setup.notes, *training.warnings],
    }


def build_model(shape: str, layers: int | None, device: Any) -> Any:
    """Return a base model of random weights on the device, frozen weights in 16 bits on a GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.models import choose_dtype

    values = dict(SHAPES[shape])
    if layers is not None:
        values["num_hidden_layers"] = layers
    kind = values.pop("model_type")
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    torch.set_default_dtype(choose_dtype("auto", device))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **values, max_position_embeddings=32768, **special)
        )
    torch.set_default_dtype(torch.float32)
    return model.eval()


def draw_table(num_rows: int, vocabulary: int) -> Any:
    """Return the examples as a training maps them."""
    import numpy as np

    from tasks.training.token_table import TokenTable

    rows = trainers.draw_rows(150_000)[:num_rows]
    ids = np.concatenate([np.array(row["input_ids"], np.int32) % vocabulary for row in rows])
    mask = np.concatenate([np.array(row["completion_mask"], bool) for row in rows])
    offsets = np.cumsum([0, *(len(row["input_ids"]) for row in rows)]).astype(np.int64)
    # No target at an example's first token: nothing stands before it.
    targets = np.where(np.roll(mask, -1), np.roll(ids, -1), -100).astype(np.int32)
    targets[offsets[1:] - 1] = -100
    return TokenTable([f"row {number}" for number in range(len(rows))], offsets, ids, targets)


def prepare(model: Any, table: Any, config: Any, steps: int) -> Any:
    """Return the training as `tasks.training.preparation` would, of a model and rows that lie in memory."""
    import torch

    from tasks.models import choose_device, choose_dtype
    from tasks.training.engines.choice import choose_engine
    from tasks.training.lora import attach_adapter, collect_trained
    from tasks.training.optimizers import WholeOptimizer
    from tasks.training.preparation import Setup

    device = choose_device()
    dtype = choose_dtype(config.precision, device)
    rows = [[index] for index in range(len(table.example_ids))]
    adapted = attach_adapter(model, config, seed=0).to(device)
    parameters = collect_trained(adapted)
    engine, notes = choose_engine(adapted, table, rows, config, device=device, dtype=dtype)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.learning_rate, fused=True)
    engine.attach_to(optimizer)
    whole = WholeOptimizer(parameters, optimizer, config.max_grad_norm, engine.bind_gradients())
    trained = sum(parameter.numel() for parameter in parameters.values())
    return Setup(
        config, 0, adapted, parameters, trained, whole, table, None, rows, steps, steps, steps, engine, notes, device,
        dtype,
    )  # fmt: skip


if __name__ == "__main__":
    main()
