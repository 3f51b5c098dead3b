"""What a training needs of the memory before its first forward pass, and which settings need less.

Weights, gradients and moments are counted on the model without values. The activations are not guessed: the training
measures them itself (`tasks.training.engines.memory_fit`) and fits passes and recomputation into what is left, down to
one example with every layer recomputed; the highest use of earlier trainings is in `tasks.speeds`.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from schemas.config import TrainingConfig
from tasks.decoder.float8 import has_float8_sizes
from tasks.families.adaptation import CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTED, ROUTER, AdaptationPlan, Weight
from tasks.merging.changes import build_skeleton
from tasks.training.adamw import EIGHT_BITS, count_moment_bytes
from tasks.training.lora import plan_adapter
from tasks.training.own_weights import plan_weights
from tasks.training.throughput import count_frozen_flop, count_useful_flop

_SHARE = 0.9
"""Of a device's memory that a training plans for; see memory_fit."""
_NF4_BYTES = 0.5 + 0.127 / 8
"""A value of NF4 with its scales quantized twice (Dettmers et al., 2023, section 3): 4.127 bits."""
_FP32 = 4
_SMALLEST_LOGITS = 1 << 28
_INPUTS_AT_WORK = 8
"""A layer's work, in sizes of its input: that and the next one's, what is normed of it, the mixer's queries or the like
and output, the gradients of both, and the stream's."""
# What FP8 leaves as it is.
_OUTSIDE_LAYERS = (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a training on each of its devices."""

    weights_bytes: int
    """The base in the form that the training holds it in."""
    trained_bytes: int
    """What is trained, its gradient and the optimizer's moments."""
    least_pass_bytes: int
    """The smallest forward pass: the layers' inputs of one example, or of this device's part of it, and some logits. A
    lower bound."""
    num_trained: int
    loaded_bytes: int = 0
    """The base as it is loaded, where the training makes another form of it on the device (FP8)."""
    passing_bytes: int = 0
    """Of the weights, 16-bit copies that the training holds for two layers at a time where the memory is short."""
    host_bytes: int = 0
    """Of the smallest pass, layers' inputs that lie in the host's memory where the device is short."""
    spared_bytes: int = 0
    """Of the smallest pass, what the device does not hold then."""

    @property
    def fixed_bytes(self) -> int:
        """Whatever the batch."""
        return self.weights_bytes + self.trained_bytes

    @property
    def least_bytes(self) -> int:
        """With the smallest pass, and before it, while the base lies there as it was loaded."""
        return max(self.whole_bytes - self.spared_bytes, self.loaded_bytes)

    @property
    def whole_bytes(self) -> int:
        """With the smallest pass, all layers' inputs on the device."""
        return self.fixed_bytes - self.passing_bytes + self.least_pass_bytes


@dataclass(frozen=True)
class Option:
    """A change of settings, and what the training needs then."""

    settings: str
    least_bytes: int


def read_capacity(device: torch.device) -> int:
    """Return the bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def count_need(
    folder: Path, config: TrainingConfig, *, dtype: torch.dtype, longest: int, host_bytes: int = 0
) -> MemoryNeed:
    """Count what a training of a model needs.

    Args:
        folder: of the base model; its config.json is read.
        config: the training section.
        dtype: of the products and the frozen weights.
        longest: tokens of the longest example.
        host_bytes: of the host's memory that the training may take for layers' inputs; none where it is on a CPU.

    Raises:
        ValueError: a setting does not go with this model.
    """
    return _count(build_skeleton(folder), config, dtype, longest, host_bytes)


def find_longest(
    folder: Path, config: TrainingConfig, *, dtype: torch.dtype, longest: int, capacity_bytes: int, host_bytes: int = 0
) -> int:
    """Return how many tokens an example may have, at most `longest`, to fit by what is counted; 0 where none does."""
    skeleton = build_skeleton(folder)
    fitting, above = 0, longest + 1
    while above - fitting > 1:
        middle = (fitting + above) // 2
        is_enough = fits(_count(skeleton, config, dtype, middle, host_bytes), capacity_bytes)
        fitting, above = (middle, above) if is_enough else (fitting, middle)
    return fitting


def list_options(
    folder: Path, config: TrainingConfig, *, dtype: torch.dtype, longest: int, capacity_bytes: int, host_bytes: int = 0
) -> tuple[Option, ...]:
    """Return the single changes of the config with which the training fits, the mildest first; none where it fits."""
    skeleton = build_skeleton(folder)
    room = _SHARE * capacity_bytes
    if _count(skeleton, config, dtype, longest, host_bytes).least_bytes <= room:
        return ()
    options = []
    for update in _list_changes(config, dtype):
        try:
            changed = TrainingConfig.model_validate({**config.model_dump(), **update})
            need = _count(skeleton, changed, dtype, longest, host_bytes)
        except ValueError:
            continue  # it does not go with the other settings, or with this model
        if need.least_bytes <= room:
            written = ", ".join(f"training.{name} {value}" for name, value in update.items())
            options.append(Option(written, need.least_bytes))
    return tuple(options)


def count_flop(folder: Path, config: TrainingConfig) -> float:
    """Return the useful FLOP of training a token, as a training of this config notes them."""
    skeleton: Any = build_skeleton(folder)
    trained: set[str] = set()
    if not config.is_lora:
        trained = {weight.name for weight in plan_weights(skeleton, config) if not weight.skipped}
    for name, parameter in skeleton.named_parameters():
        parameter.requires_grad_(name in trained)
    return count_frozen_flop(skeleton) if config.is_lora else count_useful_flop(skeleton)


def fits(need: MemoryNeed, capacity_bytes: int) -> bool:
    """Say whether the training can begin there; how fast is another matter."""
    return need.least_bytes <= _SHARE * capacity_bytes


def needs_host(need: MemoryNeed, capacity_bytes: int) -> bool:
    """Say whether the training begins there only with layers' inputs in the host's memory."""
    return fits(need, capacity_bytes) and need.whole_bytes > _SHARE * capacity_bytes


def _list_changes(config: TrainingConfig, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Give changes that want less memory."""
    if config.optimizer != EIGHT_BITS:
        yield {"optimizer": EIGHT_BITS}
    if config.is_lora and config.rank > 8:
        yield {"rank": 8, "alpha": 8 * config.alpha / config.rank}
    if config.is_lora and dtype == torch.float32 and config.precision != "bf16":
        yield {"precision": "bf16"}
    if config.is_lora and config.base_weights == "full":
        yield {"base_weights": "nf4"}
    if not config.is_lora:
        lora = {"method": "lora", "trained_modules": ()}
        yield lora
        yield {**lora, "base_weights": "nf4"}
    for number in (2, 4, 8):
        rows = config.rows_per_step
        if number > config.num_ranks and number <= rows:
            yield {"num_processes": number, "strategy": "fsdp"}
        if number > config.context_parallel:  # whole weights on each, and a part of the tokens
            yield {"num_processes": number, "context_parallel": number}


def _count(skeleton: Any, config: TrainingConfig, dtype: torch.dtype, longest: int, host_bytes: int = 0) -> MemoryNeed:
    if config.precision == "bf16":
        dtype = torch.bfloat16
    values = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    total, passing = sum(values.values()), 0
    sizes = skeleton.config.get_text_config()
    if config.is_lora:
        plan = plan_adapter(skeleton, config)
        num_trained = sum(_count_adapter(weight.shape, config.rank) for weight in plan.adapted)
        saved = [name for name in values if any(f".{part}." in f".{name}" for part in config.modules_to_save)]
        num_trained += sum(values[name] for name in saved)
        weights = int(total * dtype.itemsize - _count_saved(plan, config, dtype))
    else:
        chosen = [weight for weight in plan_weights(skeleton, config) if not weight.skipped]
        num_trained = sum(weight.num_values for weight in chosen)
        # Trained values are fp32 and counted below; the fused engine holds a 16-bit copy of each.
        weights = (total - num_trained) * dtype.itemsize + (num_trained * 2 if dtype != torch.float32 else 0)
    trained = num_trained * (2 * _FP32 + count_moment_bytes(config))
    ranks = config.num_ranks
    is_divided = config.strategy != "ddp" and ranks > 1
    is_fused = is_divided and config.strategy == "fsdp" and config.is_lora and config.engine != "general"
    if not config.is_lora and not is_divided and dtype != torch.float32 and config.engine != "general":
        passing = _count_passing(skeleton, {weight.name for weight in chosen})
    share = partial(_count_share, skeleton, total, ranks, dtype)
    if is_divided:
        weights = share(weights) if is_fused else -(-weights // ranks)
        trained = trained if config.is_lora else -(-trained // ranks)
    layers, hidden = int(sizes.num_hidden_layers), int(sizes.hidden_size)
    vocabulary = int(sizes.vocab_size)
    own = -(-longest // config.context_parallel)
    logits = min(_SMALLEST_LOGITS, own * vocabulary * _FP32)
    an_input = hidden * own * dtype.itemsize
    least_pass = layers * an_input + logits
    in_host = spared = 0
    if config.engine != "general" and config.gradient_checkpointing is not False:
        in_host, spared = _count_in_host(layers, an_input, host_bytes // config.num_own_processes)
    loaded = 0
    if config.base_weights == "fp8":
        loaded = (share if is_fused else int)(total * dtype.itemsize) + num_trained * _FP32
        # The backward pass transposes the experts of one product at a time.
        least_pass += max((weight.num_values for weight in plan.weights if _is_expert_stack(weight)), default=0)
    return MemoryNeed(weights, trained, least_pass, num_trained, loaded, passing, in_host, spared)


def _count_in_host(layers: int, input_bytes: int, host_bytes: int) -> tuple[int, int]:
    """Return the bytes of layers' inputs that the host's memory takes, and by how many the device then holds less.

    On the device stay at least as many bytes as a layer's work takes, a lower bound of it.
    """
    number = min(layers - 1, host_bytes // max(1, input_bytes))
    left = max(_INPUTS_AT_WORK, layers - number + 2)
    return (number * input_bytes, (layers - left) * input_bytes) if left < layers else (0, 0)


def _count_passing(skeleton: Any, trained: Set[str]) -> int:
    """Return the bytes of 16-bit copies of the layers' trained matrices, but for the two largest layers'."""
    chosen = {id(parameter) for name, parameter in skeleton.named_parameters() if name in trained}
    sizes = sorted(
        sum(each.numel() for each in layer.parameters() if each.dim() == 2 and id(each) in chosen)
        for layer in _list_layers(skeleton)
    )
    return 2 * sum(sizes[:-2])


def _list_layers(skeleton: Any) -> Sequence[Any]:
    """Return the text decoder's layers; none where the fused engine does not know it."""
    decoder = skeleton.get_decoder() or skeleton
    layers: Sequence[Any] = getattr(getattr(decoder, "language_model", decoder), "layers", ())
    return layers


def _count_share(skeleton: Any, total: int, ranks: int, dtype: torch.dtype, weights_bytes: int) -> int:
    """Return what a rank holds of the weights where the fused engine divides the layers: two of these are whole too.

    Args:
        skeleton: the model.
        total: its values.
        ranks: that hold it together.
        dtype: of what is outside the layers, which each holds whole.
        weights_bytes: of the model in the form that it is held in.
    """
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in _list_layers(skeleton)]
    if not sizes:  # the fused engine does not know it
        return -(-weights_bytes // ranks)
    outside = (total - sum(sizes)) * dtype.itemsize
    inside = weights_bytes - outside
    return outside + -(-inside // ranks) + 2 * inside * max(sizes) // sum(sizes)


def _count_saved(plan: AdaptationPlan, config: TrainingConfig, dtype: torch.dtype) -> float:
    """Return by how many bytes the base is smaller than in its own precision.

    FP8: every linear layer, adapted or not, twice, with a scale a row; experts that lie in one parameter once. NF4: the
    linear layers that are adapted; such experts stay as they are.
    """
    if config.base_weights == "nf4":
        packed = sum(weight.num_values for weight in plan.adapted if not weight.is_parameter)
        return packed * (dtype.itemsize - _NF4_BYTES)
    if config.base_weights != "fp8":
        return 0.0
    saved = 0
    for weight in plan.weights:
        if _is_expert_stack(weight):
            quantized = weight.num_values + _FP32 * weight.shape[0] * max(weight.shape[1:])
        elif len(weight.shape) == 2 and weight.kind not in _OUTSIDE_LAYERS and has_float8_sizes(*weight.shape):
            quantized = 2 * weight.num_values + _FP32 * sum(weight.shape)
        else:
            continue
        saved += weight.num_values * dtype.itemsize - quantized
    return saved


def _is_expert_stack(weight: Weight) -> bool:
    """Say whether a weight holds a matrix of each routed expert."""
    return weight.is_parameter and weight.kind == ROUTED and len(weight.shape) == 3


def _count_adapter(shape: tuple[int, ...], rank: int) -> int:
    """Return the values of both matrices beside a weight [out, in], or beside each of E experts' [E, out, in]."""
    experts = shape[0] if len(shape) == 3 else 1
    return experts * rank * (shape[-1] + shape[-2])
