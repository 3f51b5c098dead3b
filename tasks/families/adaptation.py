"""Which weights of a model an adapter stands beside, which not, and why: every weight matrix is accounted for.

`all-linear` is attention, dense layers, shared and routed experts of the text decoder. Routed experts that lie in one
parameter [E, out, in] are adapted as such. Routers, the output head, embeddings and the parts of a composite that see
no text are not, unless they are named.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from schemas.artifacts import AdaptedWeights
from schemas.plurals import count_of
from tasks.families.classes import FamilyError
from tasks.families.registry import Family, explain_refused, explain_skipped, find_family

ALL_LINEAR = "all-linear"
ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS = "routers", "output head", "embeddings", "other parts", "convolutions"
ROUTED, SHARED, OTHER = "routed experts", "shared experts", "other"
# The first pattern that is found in a weight's path says its kind.
_KINDS = (
    (ROUTED, r"\.experts\b"),
    (SHARED, r"\.(shared|share)_(experts?|mlp)\b|\.shared_expert"),
    ("recurrent layers", r"\.(mamba|ssm|linear_attn|conv|short_conv|delta_net|recurrent)\b|Mamba|Delta|ShortConv"),
    ("attention", r"attn|attention|Attention"),
    ("dense layers", r"mlp|feed_forward|ffn|MLP|FeedForward"),
    ("recurrent layers", r"\.mixer\b"),
)
_ROUTER_NAMES = re.compile(r"(^|_)(router|shared_expert_gate)$")
# Projections of an expert that later versions of transformers hold in one parameter.
_FUSED = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("w2",),)}
_REASONS = {
    ROUTER: "stay as they are unless training.target_modules names them",
    HEAD: "is not among all-linear",
    EMBEDDINGS: "are no linear layers: see training.modules_to_save",
    OUTSIDE: "see no token of a text run",
    CONVOLUTIONS: "are no linear layers",
}
_NO_LINEAR = "no linear layer"
# Of a bias for each expert, or a decay for each channel and state.
_NO_MATRIX = re.compile(r"bias$|^A_log$")
_NOT_NAMED = "not named by training.target_modules"


@dataclass(frozen=True)
class Weight:
    """One weight matrix, or one stack of an expert's each."""

    name: str
    """Of the parameter in the model."""
    module: str
    """Path of the module that holds it."""
    kind: str
    num_values: int
    shape: tuple[int, ...]
    is_parameter: bool
    """Adapted as a parameter; else the whole module is."""
    skipped: str
    """Why no adapter stands beside it; empty where one does."""


@dataclass(frozen=True)
class AdaptationPlan:
    """Every weight matrix of a model."""

    weights: tuple[Weight, ...]

    @property
    def adapted(self) -> tuple[Weight, ...]:
        """Those that an adapter stands beside."""
        return tuple(weight for weight in self.weights if not weight.skipped)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the modules that are adapted."""
        return tuple(weight.module for weight in self.adapted if not weight.is_parameter)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that are adapted as such."""
        return tuple(weight.name for weight in self.adapted if weight.is_parameter)


def plan_adaptation(model: Any, target_modules: Sequence[str]) -> AdaptationPlan:
    """Decide for each weight matrix of a model whether an adapter stands beside it.

    Args:
        model: of transformers, with or without values (meta device).
        target_modules: `all-linear` alone, or names that end the path of modules or of parameters of experts.

    Raises:
        FamilyError: a name is not in the text decoder; the message lists those that are. Or nothing would be adapted.
    """
    family = find_family(model.config)
    if why := explain_refused(model.config):
        raise FamilyError(f"{model.config.model_type}: {why}")
    found = list(_find_weights(model, family))
    if tuple(target_modules) == (ALL_LINEAR,):
        weights = tuple(found)
    else:
        _check_names(model, found, target_modules)
        names = _expand(found, target_modules)
        weights = tuple(_choose(weight, names, family) for weight in found)
    plan = AdaptationPlan(weights)
    if not plan.adapted:
        raise FamilyError(
            f"no weight of this {type(model).__name__} would be adapted: {'; '.join(explain(plan)) or 'it has none'}"
        )
    return plan


def summarize(plan: AdaptationPlan) -> tuple[AdaptedWeights, ...]:
    """Count weights and values by kind, those that are adapted and all."""
    kinds = dict.fromkeys(weight.kind for weight in plan.weights)
    rows = []
    for kind in kinds:
        members = [weight for weight in plan.weights if weight.kind == kind]
        adapted = [weight for weight in members if not weight.skipped]
        rows.append(
            AdaptedWeights(
                kind=kind,
                num_weights=len(members),
                num_adapted=len(adapted),
                num_values=sum(weight.num_values for weight in members),
                num_adapted_values=sum(weight.num_values for weight in adapted),
                skipped=tuple(_explain(members)),
            )
        )
    return tuple(sorted(rows, key=lambda row: -row.num_values))


def describe(rows: Iterable[AdaptedWeights]) -> str:
    """Say in one line which part of the text decoder's linear weights is adapted, by kind."""
    rows = [row for row in rows if row.kind not in (EMBEDDINGS, HEAD, OUTSIDE, CONVOLUTIONS)]
    adapted, everything = (sum(getattr(row, name) for row in rows) for name in ("num_adapted_values", "num_values"))
    parts = [f"{row.kind} {row.num_adapted} of {row.num_weights}" for row in rows]
    return (
        f"The adapter stands beside {adapted / everything:.1%} of the text decoder's {everything:,} linear weights' "
        f"values ({', '.join(parts)})"
    )


def explain(plan: AdaptationPlan) -> list[str]:
    """Say of each kind which weights are not adapted, and why."""
    return _explain(plan.weights)


def find_text_part(model: Any) -> str:
    """Return the path of the text decoder inside a composite model; empty for a text model."""
    decoder = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    outside = set(_name_parts(model.config)) - {"text_config"}
    return path if path and outside else ""


def find_head(model: Any) -> Any:
    """Return the output head, of the text part where a composite does not name it; None where there is none."""
    parts = (part for part in model.modules() if hasattr(part, "get_output_embeddings"))
    return next((head for part in parts if (head := part.get_output_embeddings()) is not None), None)


def list_kinds(model: Any) -> dict[str, str]:
    """Return for each parameter, by its first name, what the module that holds it is for."""
    part, head = find_text_part(model), find_head(model)
    holders = {id(value): (path, module) for path, module in reversed(list(model.named_modules()))
               for value in module.parameters(recurse=False)}  # fmt: skip
    kinds = {}
    for name, value in model.named_parameters():
        path, module = holders[id(value)]
        kinds[name] = _name_kind(model, path, module, part=part, head=head)
    return kinds


def _name_parts(config: Any) -> Iterator[str]:
    """Yield the names of a config's configs of parts."""
    for name, value in vars(config).items():
        if name.endswith("_config") and hasattr(value, "model_type"):
            yield name


def _explain(weights: Iterable[Weight]) -> list[str]:
    groups: dict[tuple[str, str], list[Weight]] = {}
    for weight in weights:
        if weight.skipped:
            groups.setdefault((weight.kind, weight.skipped), []).append(weight)
    return [
        f"{kind}: {count_of(len(members), 'weight')} such as {members[0].name} ({why})"
        for (kind, why), members in groups.items()
    ]


def _find_weights(model: nn.Module, family: Family) -> Iterator[Weight]:
    """Yield every weight matrix once, with what `all-linear` makes of it."""
    part = find_text_part(model)
    text: Any = model
    head, embeddings = find_head(model), text.get_input_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    for path, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or _NO_MATRIX.search(short):
                continue
            name = f"{path}.{short}" if path else short
            kind = _name_kind(model, path, module, part=part, head=head)
            is_linear = isinstance(module, (nn.Linear, Conv1D)) and short == "weight"
            is_stack = kind == ROUTED and parameter.dim() == 3
            skipped = _REASONS.get(kind, "") or explain_skipped(family, path)
            if not skipped and not (is_linear or is_stack):
                skipped = _NO_LINEAR
            is_parameter = not (is_linear and _returns_product(module)) and not isinstance(module, nn.Embedding)
            num_values = 0 if is_tied and module is head else parameter.numel()
            yield Weight(name, path, kind, num_values, tuple(parameter.shape), is_parameter, skipped)


def _returns_product(module: nn.Module) -> bool:
    """Say whether a linear layer returns W x and nothing else; some routers and grouped projections do not."""
    forward = type(module).forward
    return forward in (nn.Linear.forward, Conv1D.forward) or type(module).__module__.startswith("bitsandbytes")


def _name_kind(model: nn.Module, path: str, module: nn.Module, *, part: str, head: Any) -> str:
    """Return what a weight is for."""
    if module is head:
        return HEAD
    is_beside = bool(part) and not f"{path}.".startswith(f"{part}.")
    outside = find_family(model.config).outside
    if is_beside or (outside and set(outside) & _name_path(model, path)):
        return OUTSIDE
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return CONVOLUTIONS
    if _is_router(model, path):
        return ROUTER
    if type(module).__name__.endswith("Experts"):
        return ROUTED
    parent = type(model.get_submodule(path.rpartition(".")[0])).__name__
    inner = f".{path[len(part) :].lstrip('.')} in {parent}"
    return next((kind for kind, pattern in _KINDS if re.search(pattern, inner)), OTHER)


def _name_path(model: nn.Module, path: str) -> set[str]:
    """Return the names and the classes of a module and of those that it lies in."""
    parts = path.split(".")
    inner = (model.get_submodule(".".join(parts[: length + 1])) for length in range(len(parts)))
    return {*parts, *(type(module).__name__ for module in inner)}


def _is_router(model: nn.Module, path: str) -> bool:
    """Say whether a module, or one that it lies in, chooses experts: by its class, or by its name beside experts."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        parent, name = ".".join(parts[: length - 1]), parts[length - 1]
        if name.isdigit():
            break
        if _ROUTER_NAMES.search(name):
            return True
        kind = type(model.get_submodule(".".join(parts[:length]))).__name__
        if re.search(r"Router|Top[Kk]|M[Oo]EGate$", kind) and not kind.endswith(("MLP", "Experts", "Block", "Moe")):
            return True
        siblings = [child for child, _ in model.get_submodule(parent).named_children()] if parent else []
        if name == "gate" and any("expert" in sibling for sibling in siblings):
            return True
    return False


def _choose(weight: Weight, names: Iterable[str], family: Family) -> Weight:
    """Return a weight as named targets have it."""
    if weight.kind == OUTSIDE:
        return weight
    # A module's name stands for its weight, and the name of an experts' module for all its parameters.
    is_named = any(f".{path}".endswith(f".{name}") for name in names for path in (weight.name, weight.module))
    if not is_named:
        return _with(weight, weight.skipped if weight.skipped == _NO_LINEAR else _NOT_NAMED)
    why = explain_skipped(family, weight.module)
    is_convolution = weight.kind == CONVOLUTIONS
    return _with(weight, why or (_REASONS[CONVOLUTIONS] if is_convolution else ""))


def _with(weight: Weight, skipped: str) -> Weight:
    return Weight(**{**vars(weight), "skipped": skipped})


def _expand(weights: Sequence[Weight], names: Sequence[str]) -> tuple[str, ...]:
    """Add the parameter of experts that named projections are part of."""
    expanded = list(names)
    for fused, groups in _FUSED.items():
        has_it = any(weight.is_parameter and weight.name.endswith(f".{fused}") for weight in weights)
        if has_it and any(set(group) <= set(names) for group in groups):
            expanded.append(fused)
    return tuple(expanded)


def _check_names(model: nn.Module, weights: Sequence[Weight], names: Sequence[str]) -> None:
    """Raise FamilyError unless each name ends the path of a weight of the text decoder, or of its module."""
    inside = [weight for weight in weights if weight.kind not in (OUTSIDE, CONVOLUTIONS)]
    paths = {f".{path}" for weight in inside for path in (weight.name, weight.module)}
    expanded = _expand(weights, names)
    covered = {part for fused, groups in _FUSED.items() if fused in expanded for group in groups for part in group}
    unknown = [name for name in names if name not in covered and not any(path.endswith(f".{name}") for path in paths)]
    if unknown:
        known = {weight.name.rsplit(".", 1)[-1] if weight.is_parameter else _last(weight.module) for weight in inside}
        halves = {part for groups in _FUSED.values() for group in groups for part in group}
        known_names = ", ".join(sorted(known - {"weight"}))
        hint = " (an expert's gate and up projection are one weight here: name both)" if halves & set(unknown) else ""
        raise FamilyError(
            f"training.target_modules names {', '.join(map(repr, unknown))}, which are not in this "
            f"{type(model).__name__}{hint}: choose from {known_names}, or all-linear alone"
        )


def _last(path: str) -> str:
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)
