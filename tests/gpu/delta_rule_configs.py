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

# Heads of keys and of values of Qwen3.5-4B: forms do not depend on how many there are.
_NUM_KEYS, _NUM_VALUES = 16, 32
_HEAD_SIZE = 128
_LENGTHS = (900, 140, 64, 2000, 300, 692)


def main() -> None:
    """Run forward and backward passes, and write what was found."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for is_ours in (True, False):
        for name in ("first", "second"):
            started = time.perf_counter()
            run(is_ours=is_ours)
            torch.cuda.synchronize()
            print(f"ours: {is_ours}, {name} pass {time.perf_counter() - started:.2f} s", flush=True)
    for kernel, found in collect().items():
        (folder / f"{kernel}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(kernel, found["autotune_entries"], flush=True)


def run(*, is_ours: bool) -> None:
    """Run the delta rule there and back: as our decoder calls it, on a pack, or as transformers does, on rows alike."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    host = torch.tensor([0, *_LENGTHS]).cumsum(0)
    shape = (1, sum(_LENGTHS)) if is_ours else (4, 1024)
    further: dict[str, Any] = {"cu_seqlens": host.cuda(), "cu_seqlens_cpu": host} if is_ours else {}

    def draw(*rest: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, *rest, device="cuda", dtype=dtype)

    queries, keys = (torch.nn.functional.normalize(draw(_NUM_KEYS, _HEAD_SIZE), dim=-1) for _ in range(2))
    values = draw(_NUM_VALUES, _HEAD_SIZE)
    decay = -draw(_NUM_VALUES, dtype=torch.float32).abs()
    beta = draw(_NUM_VALUES, dtype=torch.float32 if is_ours else torch.bfloat16).sigmoid()
    inputs = [tensor.detach().requires_grad_() for tensor in (queries, keys, values, decay, beta)]
    queries, keys, values, decay, beta = inputs
    out, _ = chunk_gated_delta_rule(
        queries, keys, values, g=decay, beta=beta, scale=_HEAD_SIZE**-0.5, use_qk_l2norm_in_kernel=not is_ours,
        output_final_state=not is_ours, **further,
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
