"""Liger's kernels for norms and gated layers (Hsu et al., 2024), where the package is installed and knows the family.

Its patches of a model's modules are kept where the trial shows that they are exact; those of transformers' own modules,
which would reach every other model of the process, are taken back at once.
"""

import logging
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

# Rotations are patched for all models of a family at once, and the head is `chunked_head`'s.
_SETTINGS = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(base: Any, refuse: Callable[[], str]) -> str:
    """Patch a model's modules where that is exact; return a line for a person where it would not be.

    Args:
        base: on its device.
        refuse: says why the patched model is not exact, or nothing where it is.
    """
    if next(base.parameters()).device.type != "cuda":
        return ""
    try:
        from liger_kernel.transformers.monkey_patch import (
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except (ImportError, RuntimeError):
        return ""
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return ""
    restore = remember(base)
    try:
        _apply_liger_kernel_to_instance(model=base, **_SETTINGS)
        reason = refuse()
    except Exception as error:  # it patches by names, and raises whatever an unknown model raises
        reason = str(error).partition("\n")[0]
    restore_modules, restore_globals = restore
    restore_globals()
    if reason:
        restore_modules()
        return f"Liger's kernels are not used: {reason}"
    logger.info("Norms and gated layers are Liger's kernels")
    return ""


def remember(base: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return functions that undo what is set, from now on, on a model's modules, and on the Python module of its class.

    Parameters and submodules are left alone.
    """
    kept = {"_parameters", "_buffers", "_modules"}
    modules = [
        (module, {key: value for key, value in vars(module).items() if key not in kept}) for module in base.modules()
    ]
    source = sys.modules[type(base).__module__]
    names = dict(vars(source))

    def restore_modules() -> None:
        for module, values in modules:
            for key in vars(module).keys() - values.keys() - kept:
                del vars(module)[key]
            vars(module).update(values)

    def restore_globals() -> None:
        for key in vars(source).keys() - names.keys():
            delattr(source, key)
        vars(source).update(names)

    return restore_modules, restore_globals
