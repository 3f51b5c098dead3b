"""Which of a model's own weights are trained where no adapter is: all of the text decoder's, or its last layers.

A composite's other parts (an image encoder) see no token of a text run and stay as they are. Tied weights are one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from schemas.artifacts import AdaptedWeights
from schemas.plurals import count_of
from tasks.families.adaptation import OUTSIDE, find_text_part, list_kinds
from tasks.families.classes import FamilyError
from tasks.families.registry import explain_refused

VECTORS = "norms, biases and other vectors"
_NO_TOKEN = "see no token of a text run"
_NOT_CHOSEN = "not among training.trained_layers or training.trained_modules"


@dataclass(frozen=True)
class SelectedWeight:
    """One parameter of a model."""

    name: str
    """As the model itself names it first."""
    kind: str
    num_values: int
    shape: tuple[int, ...]
    skipped: str
    """Why it is not trained; empty where it is."""


def select_weights(model: Any, *, num_layers: int | None, modules: Sequence[str] = ()) -> tuple[SelectedWeight, ...]:
    """Decide for each parameter of a model whether it is trained.

    Args:
        model: of transformers, with or without values (meta device).
        num_layers: of the last layers that are trained; None: everything is.
        modules: that are trained besides, each by the end of its dotted path, or of a parameter's.

    Raises:
        FamilyError: a family that is not trained here, a module that is not in the model, or fewer layers than asked.
    """
    if why := explain_refused(model.config):
        raise FamilyError(f"{model.config.model_type}: {why}")
    chosen = None if num_layers is None else _choose(model, num_layers, modules)
    kinds = list_kinds(model)
    weights = []
    for name, parameter in model.named_parameters():
        kind = VECTORS if parameter.dim() < 2 else kinds[name]
        skipped = _NO_TOKEN if kinds[name] == OUTSIDE else ""
        if not skipped and chosen is not None and id(parameter) not in chosen:
            skipped = _NOT_CHOSEN
        weights.append(SelectedWeight(name, kind, parameter.numel(), tuple(parameter.shape), skipped))
    return tuple(weights)


def summarize_selection(weights: Iterable[SelectedWeight]) -> tuple[AdaptedWeights, ...]:
    """Count weights and values by kind, those that are trained and all."""
    weights = list(weights)
    rows = []
    for kind in dict.fromkeys(weight.kind for weight in weights):
        members = [weight for weight in weights if weight.kind == kind]
        trained = [weight for weight in members if not weight.skipped]
        rows.append(
            AdaptedWeights(
                kind=kind,
                num_weights=len(members),
                num_adapted=len(trained),
                num_values=sum(weight.num_values for weight in members),
                num_adapted_values=sum(weight.num_values for weight in trained),
                skipped=tuple(_explain(kind, members)),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.num_values))


def describe_selection(rows: Iterable[AdaptedWeights]) -> str:
    """Say in one line which part of the model's own weights is trained, by kind."""
    rows = list(rows)
    trained, everything = (sum(getattr(row, name) for row in rows) for name in ("num_adapted_values", "num_values"))
    parts = [f"{row.kind} {row.num_adapted} of {row.num_weights}" for row in rows]
    return (
        f"{trained:,} of the model's own {everything:,} values ({trained / everything:.1%}) are trained: "
        + ", ".join(parts)
    )


def _explain(kind: str, members: Iterable[SelectedWeight]) -> Iterator[str]:
    groups: dict[str, list[SelectedWeight]] = {}
    for weight in members:
        if weight.skipped:
            groups.setdefault(weight.skipped, []).append(weight)
    for why, group in groups.items():
        yield f"{kind}: {count_of(len(group), 'weight')} such as {group[0].name} ({why})"


def _choose(model: Any, num_layers: int, modules: Sequence[str]) -> set[int]:
    """Return the ids of the parameters of the last layers and of the named modules."""
    layers = _find_layers(model)
    if num_layers > len(layers):
        raise FamilyError(
            f"training.trained_layers is {num_layers}, and this {type(model).__name__} has {len(layers)} layers"
        )
    last = layers[len(layers) - num_layers :]
    chosen = {id(parameter) for layer in last for parameter in layer.parameters()}
    for wanted in modules:
        found = [module for path, module in model.named_modules() if f".{path}".endswith(f".{wanted}")]
        named = [value for path, value in model.named_parameters() if f".{path}".endswith(f".{wanted}")]
        members = [*(value for module in found for value in module.parameters()), *named]
        if not members:
            raise FamilyError(
                f"training.trained_modules names {wanted!r}, which is not in this {type(model).__name__}: choose from "
                + ", ".join(_list_names(model))
            )
        chosen |= {id(value) for value in members}
    return chosen


def _find_layers(model: Any) -> Sequence[nn.Module]:
    """Return the text decoder's layers, first to last.

    Raises:
        FamilyError: they do not lie in one list.
    """
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    part = find_text_part(model)
    for path, module in model.named_modules():
        inside = not part or f"{path}.".startswith(f"{part}.")
        if inside and isinstance(module, nn.ModuleList) and len(module) == number:
            return list(module)
    raise FamilyError(
        f"the layers of this {type(model).__name__} do not lie in one list: set training.trained_layers to 0 and name "
        "training.trained_modules"
    )


def _list_names(model: nn.Module) -> list[str]:
    names = {
        path.rsplit(".", 1)[-1] for path, module in model.named_modules() if any(True for _ in module.parameters())
    }
    return sorted(name for name in names if name and not name.isdigit())
