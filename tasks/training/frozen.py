"""The frozen base in memory: in its own precision, or in 4 bits (QLoRA; Dettmers et al., 2023).

In 8 bits it is loaded whole as well: the fused engine quantizes it afterwards, layer by layer.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from schemas.config import TrainingConfig
from tasks.models import ModelError, load_model
from tasks.training.records import TrainingError
from tasks.training.sharding import is_sharded


def find_hindrance(config: TrainingConfig, device: torch.device) -> str:
    """Say why the config's frozen weights cannot be had on a device, and what would do; empty where they can."""
    if config.base_weights == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        return (
            "training.base_weights is fp8, which needs a GPU of compute capability 8.9 (Ada) or later: set it to full"
        )
    if config.base_weights == "nf4" and device.type != "cuda":
        # On a CPU with AVX-512, bitsandbytes 0.50 turns the weights, at the first pass in eval mode, into a form for
        # inference that gives no gradient of the input, and training would go on without one.
        return "training.base_weights is nf4, which needs a GPU: set it to full"
    return ""


def load_base(folder: Path, config: TrainingConfig, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the base, in 4 bits where the config says so, in fp32 where its own weights are trained.

    Raises:
        TrainingError: the config's weights cannot be had on this machine.
        ModelError: nothing loads from the folder.
    """
    if hindrance := find_hindrance(config, device):
        raise TrainingError(hindrance)
    if not config.is_lora:
        return load_model(folder, dtype=torch.float32)  # what of it stays frozen is cast when that is known
    if config.base_weights != "nf4":
        return load_model(folder, dtype=dtype)
    if is_sharded(config):
        raise TrainingError(
            f"training.base_weights is nf4 and training.strategy is {config.strategy}: packed weights cannot be "
            "divided: set base_weights to full, or strategy to ddp"
        )
    return load_4_bit(folder, dtype=dtype, device=device)


def load_4_bit(folder: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model whose linear layers, but not the head, are NF4 with quantized scales, and compute in `dtype`.

    Raises:
        TrainingError: bitsandbytes is missing, or cannot do it with this model on this device.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise TrainingError(
            "training.base_weights is nf4, which needs bitsandbytes: pip install 'sft-pipeline[nf4]'"
        ) from error
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        return load_model(folder, dtype=dtype, device=device, quantization=quantization)
    except ModelError as error:
        raise TrainingError(
            f"{folder} cannot be loaded in 4 bits ({error}): set training.base_weights to full"
        ) from error
