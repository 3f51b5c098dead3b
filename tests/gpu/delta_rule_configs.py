"""Finds the forms of flash-linear-attention's kernels that are fastest on this GPU, and writes them as it reads them.

    python -m tests.gpu.delta_rule_configs FOLDER

Without such files each machine tries them out in its first training, for minutes. A file a kernel, with the kernel's
name. Prints the seconds that the first and the second pass took.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

# Heads of keys and of values: Qwen3.5 to 2B, 4B and 9B with Qwen3-Next, 27B.
_HEADS = ((16, 32), (16, 16), (16, 48))
_HEAD_SIZE = 128
_LENGTHS = (900, 140, 64, 2000, 300, 692)


def main() -> None:
    """Run forward and backward passes, and write what was found."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for heads in _HEADS:
        for name in ("first", "second"):
            started = time.perf_counter()
            run(*heads)
            torch.cuda.synchronize()
            print(f"{heads}: {name} pass {time.perf_counter() - started:.2f} s", flush=True)
    for kernel, found in collect().items():
        (folder / f"{kernel}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(kernel, found["autotune_entries"], flush=True)


def run(num_keys: int, num_values: int) -> None:
    """Run the delta rule on a pack of examples, there and back."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    total = sum(_LENGTHS)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    queries, keys = (
        torch.nn.functional.normalize(draw(1, total, num_keys, _HEAD_SIZE), dim=-1).requires_grad_() for _ in range(2)
    )
    values = draw(1, total, num_values, _HEAD_SIZE).requires_grad_()
    decay = -torch.rand(1, total, num_values, device="cuda")
    beta = torch.rand(1, total, num_values, device="cuda")
    host = torch.tensor([0, *_LENGTHS]).cumsum(0)
    out, _ = chunk_gated_delta_rule(
        queries, keys, values, g=decay.requires_grad_(), beta=beta.requires_grad_(), scale=_HEAD_SIZE**-0.5,
        cu_seqlens=host.cuda(), cu_seqlens_cpu=host,
    )  # fmt: skip
    out.sum().backward()


def collect() -> dict[str, dict[str, Any]]:
    """Return what the library's tuners hold, by kernel, in the form of its files."""
    import triton
    from fla.ops.utils.cache import AutotuneKey, CachedAutotuner

    found: dict[str, dict[str, Any]] = {}
    for module in [module for name, module in sys.modules.items() if name.startswith("fla.")]:
        for tuner in list(vars(module).values()):
            tuner = _unwrap(tuner, CachedAutotuner)
            if tuner is None or not tuner.cache:
                continue
            entries = {
                AutotuneKey.key_hash(key): {
                    "autotune_key": AutotuneKey.normalize_autotune_key(key), "config": _describe(config)
                }
                for key, config in tuner.cache.items()
            }  # fmt: skip
            found[tuner.kernel_name] = {
                "kernel_name": tuner.kernel_name, "triton_version": triton.__version__, "autotune_entries": entries
            }  # fmt: skip
    return found


def _unwrap(function: Any, kind: type) -> Any | None:
    """Return the tuner inside what decorators have laid around it; None if there is none."""
    for _ in range(5):
        if isinstance(function, kind):
            return function
        inner = getattr(function, "__dict__", {}).get("fn")
        if inner is None:
            return None
        function = inner
    return None


def _describe(config: Any) -> dict[str, Any]:
    """Return a kernel's form as the library's files hold it."""
    return {
        "kwargs": dict(config.kwargs), "num_warps": config.num_warps, "num_stages": config.num_stages,
        "num_ctas": config.num_ctas, "maxnreg": config.maxnreg,
    }  # fmt: skip


if __name__ == "__main__":
    main()
