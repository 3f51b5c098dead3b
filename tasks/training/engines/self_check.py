"""Checks the fast ways at every start: loss and gradient against those of the model's own plain forward pass.

Two short pieces of the data and a made-up adapter, on the machine that is going to train. Where the adapter drops, both
sides draw the same masks, of half of all columns: a wrong one would change the gradient by about its norm.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from tasks.decoder.attention import LARGEST_HEAD, find_attentions, name_attention, warm_up
from tasks.decoder.decoder import LOGITS_BYTES, Decoder
from tasks.decoder.delta_rule import find_delta_rules, name_delta_rule
from tasks.decoder.divided import DividedLayers
from tasks.decoder.dropout import BEFORE_MIXING, SITES, Dropout, Mask, draw_kept, number_site
from tasks.decoder.mixers import find_flash_size, has_sinks, list_attentions
from tasks.decoder.recognition import UnknownDecoderError
from tasks.out_of_memory import is_out_of_memory
from tasks.training.batches import Batch, form_batch, form_flat_batch
from tasks.training.distributed import gather
from tasks.training.engines.flat_delta_net import ruled_plainly
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.general import GeneralEngine, prepare_recomputation
from tasks.training.engines.loss import cut_trial, sum_token_losses
from tasks.training.engines.routing import RouteRecorder, routed_as
from tasks.training.lora import collect_trained
from tasks.training.methods import find_base
from tasks.training.token_table import TokenTable

# Values whose gradients a trial compares, twice in memory, where the model's own weights are trained.
_MOST_COMPARED = 1 << 28
# The gradient may differ by this part of its norm, and the loss by this part of it. In 16 bits, two ways through a deep
# model of random weights differ by a tenth; one that forgets a norm or a scale, by about one.
_TOLERANCES = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.3, 0.02)}
_TOKENS = 2048
_DROPPED_SHARE = 0.5


class Trial(NamedTuple):
    """What a trial gave."""

    loss: float
    grads: dict[str, Tensor]
    routes: tuple[Tensor, ...] = ()
    """Which experts its routers chose, in the order of the calls."""


class Differences(NamedTuple):
    """How far an engine is from a trial."""

    loss: float
    """By which part of it."""
    grads: dict[str, tuple[float, float]]
    """By which norm the gradient of each matrix differs, and the norm of the trial's own."""


def try_model(
    model: PeftModel,
    table: TokenTable,
    device: torch.device,
    dtype: torch.dtype,
    *,
    drops: bool = True,
    divided: DividedLayers | None = None,
) -> Trial:
    """Return loss and gradients of two short pieces by the model's own forward pass, with a made-up adapter.

    Args:
        model: on the device.
        table: the examples.
        device: of the trial.
        dtype: of its products.
        drops: whether the adapter drops what the fused decoder would.
        divided: gathers each layer's weights, where ranks have divided them among them.

    Raises:
        UnknownDecoderError: weights are divided, and some layer cannot run again for its gradient.
    """
    parameters = collect_trained(model)
    trial = cut_trial(table, count=2)
    flat = form_flat_batch(trial, [0, 1]).move(device)
    dropout = Dropout(_DROPPED_SHARE, torch.full((1,), flat.dropout_key, dtype=torch.int64, device=device))
    recorder = RouteRecorder()
    model.eval()
    lent = nullcontext() if divided is None else divided.lent()
    recomputing = _recomputing_layers(model, () if divided is None else divided.modules)
    with _made_up(parameters), recomputing, lent, ruled_plainly(find_base(model)), torch.enable_grad():
        loss = torch.zeros((), device=device)
        context: Any = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        for index in range(2):
            batch = form_batch(trial, [[index]]).move(device)
            first = int(trial.offsets[index])
            with dropping(model, dropout, flat, first=first) if drops else nullcontext():
                with context, recorder.recording(batch.num_tokens):
                    part = sum_token_losses(model, batch)
                part.backward()  # where layers run again, they drop the same
            loss += part.detach()
        grads = _take_grads(parameters)
    model.train()
    return Trial(float(loss.item()), grads, recorder.join())


def verify(
    model: PeftModel,
    decoder: Decoder,
    table: TokenTable,
    expected: Trial,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Decoder, list[str]]:
    """Return the decoder with the fastest attention that passes the trial, and a line for each that does not.

    Raises:
        UnknownDecoderError: none does.
    """
    notes: list[str] = []
    is_divided = decoder.divided is not None
    mixers = [layer.mixer for layer in decoder.layers]
    attentions = list_attentions(mixers)
    kinds = find_attentions(device, dtype, find_flash_size(attentions))
    rules = find_delta_rules(device, dtype) if decoder.has_delta_nets else (decoder.delta_rule,)
    ways = [(rule, kind) for rule in rules for kind in kinds]
    for rule, kind in ways:
        candidate = replace(decoder, attend=kind, delta_rule=rule)
        failure: Exception | None = None
        try:
            for heads, windows in attentions.items():
                if heads.size <= LARGEST_HEAD:
                    warm_up(kind, heads, windows, device, has_sinks=has_sinks(mixers))
            engine = FusedEngine(candidate, device, _TOKENS, 0, LOGITS_BYTES, _TOKENS)
            compare(model, engine, cut_trial(table, count=2), expected, dtype)
        except Exception as error:  # a kernel that does not compile here raises what it likes
            if is_out_of_memory(error):
                raise
            failure = error
        reason = "" if failure is None else str(failure).partition("\n")[0] or type(failure).__name__
        if is_divided:  # all ranks have to go the same way
            reason = next(filter(None, gather(reason)), "")
        if not reason:
            return candidate, notes
        if decoder.has_bound_gradients():
            decoder.clear_gradients()
        else:
            forget_grads(model)
        if (rule, kind) == ways[-1]:
            if isinstance(failure, UnknownDecoderError):
                raise failure
            raise UnknownDecoderError(f"a trial of it fails: {reason}") from failure
        name = " with ".join([*([name_delta_rule(rule)] if decoder.has_delta_nets else []), name_attention(kind)])
        notes.append(f"{name} is not used: {reason}")
    raise AssertionError("there is always one kind of attention")


def compare(
    model: PeftModel,
    engine: FusedEngine | GeneralEngine,
    pieces: TokenTable,
    expected: Trial,
    dtype: torch.dtype,
) -> None:
    """Raise UnknownDecoderError unless an engine gives the same loss and gradients.

    Args:
        model: with the adapter.
        engine: that computes with the model.
        pieces: of the trial.
        expected: from `try_model`.
        dtype: of the products.
    """
    found = measure_differences(model, engine, pieces, expected)
    limit, loss_limit = _TOLERANCES[dtype]
    difference, norm = (math.hypot(*column) for column in zip(*found.grads.values(), strict=True))
    off = difference / norm if norm else math.inf
    if not (off <= limit and found.loss <= loss_limit):
        raise UnknownDecoderError(
            f"on a trial its gradient differs by {off:.2g} of its norm (limit {limit:g}) and its loss by "
            f"{found.loss:.2g} (limit {loss_limit:g})"
        )


def measure_differences(
    model: PeftModel, engine: FusedEngine | GeneralEngine, pieces: TokenTable, expected: Trial
) -> Differences:
    """Return how far an engine is from a trial; see `compare`."""
    parameters = collect_trained(model)
    if isinstance(engine, FusedEngine) and engine.decoder.dropout is not None:
        dropout = replace(engine.decoder.dropout, p=_DROPPED_SHARE)
        engine = replace(engine, decoder=replace(engine.decoder, dropout=dropout))
    batch = engine.form_trial(pieces)
    with _made_up(parameters), torch.enable_grad():
        loss, grads = _try_engine(engine, batch, parameters, expected.routes)
    if isinstance(engine, FusedEngine):
        engine.decoder.refresh()
    # An expert that no token of a side goes to has no gradient there.
    names = sorted(expected.grads.keys() | grads.keys())
    pairs = {name: (grads.get(name), expected.grads.get(name)) for name in names}
    norms = {
        name: (_measure_norm(_subtract(found, wanted)), 0.0 if wanted is None else _measure_norm(wanted))
        for name, (found, wanted) in pairs.items()
    }
    return Differences(abs(float(loss.item()) - expected.loss) / max(abs(expected.loss), 1e-12), norms)


def _measure_norm(values: Tensor) -> float:
    return float(values.double().norm())


def _try_engine(
    engine: FusedEngine | GeneralEngine, batch: Batch, parameters: dict[str, Any], routes: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an engine's loss and gradients, and leave none."""
    loss = engine.replay_gradient(batch, 1.0)
    if loss is None:
        with routed_as(routes, batch):
            loss = engine.sum_losses(batch)
        loss.backward()
    if not (isinstance(engine, FusedEngine) and engine.decoder.has_bound_gradients()):
        return loss, _take_grads(parameters)
    grads = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    engine.decoder.clear_gradients()
    return loss, grads


def _subtract(left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return a difference in which an absent tensor is zero; one of them is there."""
    if left is None:
        assert right is not None
        return right
    return left if right is None else left - right


@contextmanager
def comparing_some(model: nn.Module, *, most_values: int = _MOST_COMPARED) -> Iterator[None]:
    """Leave gradients, for a while, to the first and the last trained weights alone where all would take much memory.

    A gradient of the first weights has come through the whole model.

    Args:
        model: with an adapter, or with weights of its own that are trained.
        most_values: that keep their gradient; at least one weight at each end does.
    """
    trained = list(collect_trained(model).values())
    resting: list[nn.Parameter] = []
    if sum(parameter.numel() for parameter in trained) > most_values:
        kept, left = set[int](), most_values
        for pair in zip(trained, reversed(trained), strict=True):
            left -= sum(parameter.numel() for parameter in pair)
            if kept and left < 0:
                break
            kept |= {id(parameter) for parameter in pair}
        resting = [parameter for parameter in trained if id(parameter) not in kept]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


@contextmanager
def _made_up(parameters: dict[str, Any]) -> Iterator[None]:
    """Fill the LoRA B matrices, which begin at zero and would hide half of a layer, for a while."""
    matrices = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
    saved = [matrix.detach().clone() for matrix in matrices]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(0.02 * torch.randn(matrix.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, values in zip(matrices, saved, strict=True):
                matrix.copy_(values)


@contextmanager
def _recomputing_layers(model: PeftModel, wanted: Sequence[nn.Module]) -> Iterator[None]:
    """Have layers run again in the backward pass where the model has adapted experts, or where some have to.

    PEFT adds an adapter to a copy of all experts' weights, which the backward pass would keep of every layer.

    Args:
        model: with the adapter.
        wanted: layers that have to.

    Raises:
        UnknownDecoderError: one of these cannot.
    """
    has_experts = any(isinstance(module, ParamWrapper) for module in model.modules())
    layers = prepare_recomputation(find_base(model)) if has_experts or wanted else ()
    if not {id(module) for module in wanted} <= {id(layer) for layer in layers}:
        raise UnknownDecoderError("its layers cannot run again for a gradient, so that divided weights cannot be tried")
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer.training = True  # of the layer itself alone: what drops is in its modules
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
            layer.training = False


def forget_grads(model: PeftModel) -> None:
    """Leave no gradient of a trial that failed."""
    _take_grads(collect_trained(model))


def _take_grads(parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients and leave none."""
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return grads


@contextmanager
def dropping(model: PeftModel, dropout: Dropout, flat: Batch, *, first: int) -> Iterator[None]:
    """Have the model's adapters drop what the fused decoder would, one example at a time.

    Args:
        model: in eval mode; its adapters without dropout are left alone.
        dropout: with the key of the decoder's forward pass.
        flat: the decoder's batch, on the model's device.
        first: position in it of the example that goes through the model.
    """
    assert flat.trained is not None
    device = flat.trained.device
    everywhere = torch.arange(flat.input_ids.shape[1], device=device)
    # After its attention the last layer goes on with the trained positions alone.
    chosen = torch.zeros_like(everywhere).index_copy_(0, flat.trained, everywhere[: len(flat.trained)])
    base = find_base(model)
    last = getattr(base.config.get_text_config(), "num_hidden_layers", 0) - 1
    hooks = []
    for name, module in model.named_modules():
        found = re.search(r"(?:\.layers\.(\d+)\.(?:\w+\.)?|\.(?=per_layer_model_projection))(\w+)$", name)
        if not found or found[2] not in SITES or not isinstance(module, LoraLayer):
            continue
        layer, kind = int(found[1] or 0), found[2]
        if isinstance(module.lora_dropout["default"], nn.Dropout):
            is_chosen = found[1] and layer == last and SITES[kind] not in BEFORE_MIXING
            rows = chosen if is_chosen else everywhere
            hook = partial(_apply, mask=dropout.mask(number_site(layer, kind)), rows=rows[first:])
            hooks.append(module.lora_dropout["default"].register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _apply(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *, mask: Mask, rows: Tensor) -> Tensor:
    """Return the output [1, S, H] of a dropout in eval mode, masked by the rows of its tokens."""
    kept = draw_kept(mask, rows[: output.shape[-2]], output.shape[-1])
    return torch.where(kept, output * mask.scale, 0.0)
