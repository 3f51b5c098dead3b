"""Forms of flash-linear-attention's kernels that were fastest on an H200, for Hopper GPUs.

The library tries dozens of forms of each kernel at its first use on a machine: two minutes. Where it finds a form in a
folder it takes that. Made by `python -m tests.gpu.delta_rule_configs`.
"""

import os
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).with_name("kernel_forms_hopper")
_CAPABILITY = (9, 0)
# Of keys and values. The forms depend on it, and not on how many heads there are, or tokens.
_HEAD_SIZE = 128
_SETTINGS = ("FLA_CACHE_MODE", "FLA_CONFIG_DIR")


def offer_kernel_forms(config: Any) -> None:
    """Show the library the known forms, before transformers imports it with a model's code.

    Args:
        config: of the model; nothing is done for one without gated DeltaNets of the known head size, on another kind of
            device, or where the environment says something itself.
    """
    text = config.get_text_config()
    sizes = {getattr(text, name, None) for name in ("linear_key_head_dim", "linear_value_head_dim")}
    if sizes != {_HEAD_SIZE} or any(name in os.environ for name in _SETTINGS):
        return
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == _CAPABILITY:
        os.environ.update(FLA_CACHE_MODE="fuzzy", FLA_CONFIG_DIR=str(FOLDER))
