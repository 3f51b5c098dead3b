"""Gated DeltaNets of examples that lie end to end, in a model of transformers; `flat_attention` does it for attention.

A model makes the mask of its recurrent layers by one function, and hands it to them. Within a layout that function
gives the layout in the mask's place, and a layer that gets one mixes each example alone.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn

from tasks.decoder.decoder import choose_operations
from tasks.decoder.delta_rule import find_delta_rules, run_plain_rule
from tasks.decoder.mixer_blocks import DeltaLayout
from tasks.decoder.mixer_recognition import build_delta_net, find_known_net, locate_parts
from tasks.decoder.mixers import run_delta_net
from tasks.decoder.module_reading import UnknownDecoderError
from tasks.training.engines.flat_attention import FlatLayout, find_layout

_MASK_FUNCTION = "create_recurrent_attention_mask"
_RULE = "torch_chunk_gated_delta_rule"


def find_delta_nets(base: nn.Module) -> list[Any]:
    """Return a model's gated DeltaNets, of known families."""
    found = []
    for module in base.modules():
        try:
            find_known_net(module)
        except UnknownDecoderError:
            continue
        found.append(module)
    return found


def use_flat_delta_nets(nets: list[Any], *, is_plain: bool) -> Callable[[], None]:
    """Have DeltaNets keep the examples of a layout apart; return a function that gives them their own way back.

    Args:
        nets: of one model, which may move to another device later.
        is_plain: whether the delta rule is that of plain PyTorch, in place of the device's fastest.
    """
    families = {sys.modules[type(net).__module__] for net in nets}
    families = {family for family in families if hasattr(family, _MASK_FUNCTION)}
    own_functions = {family: getattr(family, _MASK_FUNCTION) for family in families}
    for family, function in own_functions.items():
        setattr(family, _MASK_FUNCTION, partial(_make_mask, function))
    own_forwards = [vars(net).get("forward") for net in nets]
    for net in nets:
        net.forward = partial(_run, net, net.forward, {}, is_plain)

    def give_back() -> None:
        for family, function in own_functions.items():
            setattr(family, _MASK_FUNCTION, function)
        for net, own_forward in zip(nets, own_forwards, strict=True):
            if own_forward is None:
                del net.forward  # the class's again
            else:
                net.forward = own_forward

    return give_back


@contextmanager
def ruled_plainly(base: nn.Module) -> Iterator[None]:
    """Have a model's own forward pass run the delta rule as transformers defines it, whatever kernels are installed.

    flash-linear-attention would try forms of its kernels, for minutes, on a few tokens.
    """
    families = {sys.modules[type(net).__module__] for net in find_delta_nets(base)}
    own = {family: getattr(family, _RULE) for family in families if hasattr(family, _RULE)}
    for family, function in own.items():
        setattr(family, _RULE, unwrap(function))
    try:
        yield
    finally:
        for family, function in own.items():
            setattr(family, _RULE, function)


def _make_mask(own_function: Callable[..., Any], **arguments: Any) -> Any:
    """Return the layout of the forward pass under way, or the family's own mask where there is none."""
    layout = find_layout()
    return own_function(**arguments) if layout is None else layout


def _run(
    net: Any,
    own_forward: Callable[..., Tensor],
    layouts: dict[torch.device, DeltaLayout],
    is_plain: bool,
    hidden_states: Tensor,
    cache_params: Any = None,
    attention_mask: Any = None,
    **further: Any,
) -> Tensor:
    """Mix the examples [1, T, H] of a layout, each alone; without one, as the family does."""
    if not isinstance(attention_mask, FlatLayout):
        return own_forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **further)
    known = find_known_net(net)
    rows = torch.cat([getattr(net, name)(hidden_states) for name in known.inputs], dim=-1)[0]
    if rows.device not in layouts:
        layouts[rows.device] = locate_parts(net)
    rule = run_plain_rule if is_plain else find_delta_rules(rows.device, rows.dtype)[0]
    ops = choose_operations(rows.device, rows.dtype)
    mixed = run_delta_net(build_delta_net(net, layouts[rows.device]), rows, rule, attention_mask.segments, ops)
    result: Tensor = getattr(net, known.output)(mixed[None])
    return result
