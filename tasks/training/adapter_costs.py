"""What the kinds of training beside plain LoRA cost, in a sentence each for the run's log."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from schemas.config import TrainingConfig
from tasks.decoder.passing_copies import PASSING
from tasks.training.own_weights import describe_cost

# A value in fp32, its gradient and AdamW's two moments.
_BYTES_PER_TRAINED = 16


def describe_costs(
    config: TrainingConfig, parameters: Mapping[str, nn.Parameter], engine: str, dtype: torch.dtype
) -> list[str]:
    """Return the sentences for what a config asks for.

    Args:
        config: of the training.
        parameters: what is trained, by name.
        engine: that trains, as it describes itself.
        dtype: of its products.
    """
    if not config.is_lora:
        has_copies = engine.startswith("fused") and dtype != torch.float32 and PASSING not in engine
        return [describe_cost(parameters, config, copy_bytes=dtype.itemsize if has_copies else 0)]
    engine, sentences = engine.partition(",")[0], []
    if config.use_rslora:
        scale = config.alpha / math.sqrt(config.rank)
        sentences.append(f"rsLoRA trains with the {engine} at no cost: the adapter's scale alone differs ({scale:.3g})")
    if config.use_dora:
        sentences.append(
            f"DoRA trains with the {engine}: every pass computes B A of each adapted layer in full, to measure its norm"
        )
    if config.modules_to_save:
        count = sum(parameter.numel() for name, parameter in parameters.items() if ".modules_to_save." in name)
        sentences.append(
            f"{', '.join(config.modules_to_save)} train in full with the {engine}: {count:,} values, "
            f"{count * _BYTES_PER_TRAINED / 2**30:.2f} GiB with their gradient and AdamW's moments"
        )
    return sentences
