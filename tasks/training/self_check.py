"""The fused engine's proof at every start: its loss and gradient against those of the model's own forward pass.

Two short pieces of the data and a made-up adapter, on the machine that is going to train.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from tasks.decoder.attention import find_attentions, name_attention, warm_up
from tasks.decoder.decoder import LOGITS_BYTES, Decoder
from tasks.decoder.recognition import UnknownDecoderError
from tasks.training.batches import form_batch, form_flat_batch
from tasks.training.engines import FusedEngine
from tasks.training.lora import collect_trained
from tasks.training.loss import cut_trial, sum_token_losses
from tasks.training.memory import is_out_of_memory
from tasks.training.token_table import TokenTable

# The gradient may differ by this part of its norm, and the loss by this part of it. In 16 bits, two ways through a deep
# model of random weights differ by a tenth; one that forgets a norm or a scale, by about one.
_TOLERANCES = {torch.float32: (1e-3, 1e-4), torch.bfloat16: (0.3, 0.02)}
_TOKENS = 2048


class Trial(NamedTuple):
    """What a trial gave."""

    loss: float
    grads: dict[str, Tensor]


def try_model(model: PeftModel, table: TokenTable, device: torch.device, dtype: torch.dtype) -> Trial:
    """Return loss and gradients of two short pieces by the model's own forward pass, with a made-up adapter."""
    parameters = collect_trained(model)
    trial = cut_trial(table, count=2)
    model.eval()
    with _made_up(parameters), torch.enable_grad():
        loss = torch.zeros((), device=device)
        context: Any = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)
        with context:
            for index in range(2):
                loss = loss + sum_token_losses(model, form_batch(trial, [[index]]).move(device), trained_only=False)
        loss.backward()
        grads = _take_grads(parameters)
    model.train()
    return Trial(float(loss.item()), grads)


def prove(
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
    heads, windows = decoder.layers[0].heads, [layer.window for layer in decoder.layers]
    kinds = find_attentions(device, dtype, heads.size)
    for kind in kinds:
        candidate = replace(decoder, attend=kind)
        try:
            warm_up(kind, heads, windows, device)
            _compare(model, FusedEngine(candidate, device, _TOKENS, 0, LOGITS_BYTES, _TOKENS), table, expected, dtype)
        except Exception as error:  # a kernel that does not compile here raises what it likes
            if kind is kinds[-1] or is_out_of_memory(error):
                raise
            _take_grads(collect_trained(model))
            notes.append(f"{name_attention(kind)} is not used: {str(error).partition(chr(10))[0]}")
        else:
            return candidate, notes
    raise AssertionError("there is always one kind of attention")


def _compare(
    model: PeftModel,
    engine: FusedEngine,
    table: TokenTable,
    expected: Trial,
    dtype: torch.dtype,
) -> None:
    """Raise UnknownDecoderError unless the fused engine gives the same loss and gradients."""
    parameters = collect_trained(model)
    with _made_up(parameters), torch.enable_grad():
        loss = engine.sum_losses(form_flat_batch(cut_trial(table, count=2), [0, 1]))
        loss.backward()
        grads = _take_grads(parameters)
    engine.decoder.refresh()
    limit, loss_limit = _TOLERANCES[dtype]
    differences = [(grads[name] - grad).double().norm() ** 2 for name, grad in expected.grads.items()]
    norms = [grad.double().norm() ** 2 for grad in expected.grads.values()]
    off = float((sum(differences) / sum(norms)) ** 0.5)
    loss_off = abs(float(loss.item()) - expected.loss) / max(abs(expected.loss), 1e-12)
    if not (off <= limit and loss_off <= loss_limit):
        raise UnknownDecoderError(
            f"on a trial its gradient differs by {off:.2g} of its norm (limit {limit:g}) and its loss by "
            f"{loss_off:.2g} (limit {loss_limit:g})"
        )


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


def _take_grads(parameters: dict[str, Any]) -> dict[str, Tensor]:
    """Return the gradients and leave none."""
    grads = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return grads
