"""Reads the routed experts of a layer; what `recognition` does for the rest of it.

transformers keeps the experts of all families alike: a router, which gives logits, weights and numbers of the chosen
experts, and a module whose parameters hold a matrix of each expert. PEFT wraps that module once for each adapted one.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, cast

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from tasks.decoder.expert_elementwise import Gate
from tasks.decoder.experts import ExpertLayer, Route, Routed
from tasks.decoder.grouped import ALIGNMENT, ExpertPart, build_grouped_projection
from tasks.decoder.known_layers import KnownExperts
from tasks.decoder.module_reading import UnknownDecoderError, check_modules

# What transformers' decorator of experts leaves on a module, and what is known here.
_MARKS = {
    "has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False,
}  # fmt: skip
_CLAMPED_MARKS = {**_MARKS, "has_bias": True, "is_transposed": True, "is_concatenated": False}


def find_shared(block: nn.Module, known: KnownExperts | None) -> nn.Module | None:
    """Return the shared experts of a block of routed ones, if it has some."""
    return None if known is None or known.shared is None else getattr(block, known.shared, None)


def read_experts(block: Any, known: KnownExperts | None, activation: str) -> Callable[[], ExpertLayer] | None:
    """Check a layer's routed experts and return a function that builds them; None where the layer has none.

    Args:
        block: the layer's `mlp`, or the layer where they lie in it.
        known: what the family's blocks are made of.
        activation: of the gate.

    Raises:
        UnknownDecoderError: they are not as they are known.
    """
    if known is None or not hasattr(block, "experts"):
        return None
    shared = [known.shared] if known.shared and find_shared(block, known) is not None else []
    if shared and known.shared_gate:
        shared.append(known.shared_gate)
        if type(getattr(block, known.shared_gate, None)) is not nn.Linear:
            raise UnknownDecoderError(f"its {known.shared_gate} is no plain linear layer")
    if not known.norms:  # of a layer its reader knows the modules
        check_modules(block, {"experts", known.router, *shared})
    if getattr(block, "jitter_noise", 0):
        raise UnknownDecoderError(f"its {type(block).__name__} adds noise to what the router sees")
    router, outer = getattr(block, known.router), block.experts
    if isinstance(router, ParamWrapper) or any(parameter.requires_grad for parameter in router.parameters()):
        raise UnknownDecoderError("its router is trained")
    wrappers: dict[str, Any] = {}
    while isinstance(outer, ParamWrapper):
        wrappers[outer.parameter_name] = outer
        outer = outer.base_layer
    _check_marks(outer, _CLAMPED_MARKS if known.is_clamped else _MARKS)
    gate = Gate("clamped", True, float(outer.alpha), float(outer.limit)) if known.is_clamped else Gate(activation)
    gate_up, down = (_read_part(outer, name, wrappers.pop(name, None)) for name in ("gate_up_proj", "down_proj"))
    num_chosen = int(router.config.top_k_experts if known.norms else router.top_k)
    if wrappers:
        raise UnknownDecoderError(f"its experts' {', '.join(sorted(wrappers))} is adapted")

    def build() -> ExpertLayer:
        return ExpertLayer(
            route=_find_route(block, router),
            shared_gate=getattr(block, known.shared_gate) if shared and known.shared_gate else None,
            gate_up=build_grouped_projection(gate_up),
            gate=gate,
            down=build_grouped_projection(down),
            num_chosen=num_chosen,
        )

    return build


def _find_route(block: Any, router: Any) -> Route:
    """Return the router, with the bias of its choice where a block holds that and hands it over (MiniMax M2)."""
    if "e_score_correction_bias" not in signature(router.forward).parameters:
        return cast("Route", router)
    return lambda hidden: cast("Routed", router(hidden, block.e_score_correction_bias))


def _check_marks(experts: Any, marks: dict[str, bool]) -> None:
    """Refuse experts whose arithmetic is another one."""
    name = type(experts).__name__
    for mark, value in marks.items():
        if getattr(experts, mark, None) is not value:
            raise UnknownDecoderError(f"its {name} has {mark} {getattr(experts, mark, None)}")


def _read_part(experts: Any, name: str, wrapper: Any | None) -> ExpertPart:
    """Return a parameter of the experts with its adapter, if it has one."""
    weight = getattr(experts, name, None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 3 or not weight.is_floating_point():
        raise UnknownDecoderError(f"its experts' {name} is a {type(weight).__name__}")
    bias, is_turned = getattr(experts, f"{name}_bias", None), bool(experts.is_transposed)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise UnknownDecoderError(f"its experts' {name} is trained")
    if odd := [size for size in weight.shape[1:] if size % ALIGNMENT]:
        raise UnknownDecoderError(
            f"its experts' {name} has {odd[0]} rows or columns, which is no multiple of {ALIGNMENT}"
        )
    bias = None if bias is None else bias.detach()
    if wrapper is None:
        return ExpertPart(weight, bias, None, None, 0.0, is_turned)
    if list(wrapper.lora_A) != ["default"] or wrapper.merged:
        raise UnknownDecoderError(f"the adapter of its experts' {name} is not one plain LoRA")
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    num_experts, num_out, num_in = weight.mT.shape if is_turned else weight.shape
    if a.shape[1] != num_in or b.shape[0] != num_out or a.shape[0] != b.shape[1] or a.shape[0] % num_experts:
        raise UnknownDecoderError(f"the adapter of its experts' {name} has other shapes than is known")
    return ExpertPart(weight, bias, a, b, float(wrapper.scaling["default"]), is_turned)
