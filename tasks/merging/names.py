"""Where each tensor of a model lies in its checkpoint's files, and how: names and layouts differ in many families.

transformers renames tensors while it loads them, and puts some together: the projections of all experts in one tensor,
gate beside up. Here the same rules (its private `core_model_loading`) say which stored tensors a change goes to, and
which part of it to each; nothing is loaded. A layout that is not understood is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from tasks.merging.changes import Change, LowRank, MergeError, Replacement
from tasks.merging.joined import Joined, RowsChange, StoredChange, find_dim, find_places
from tasks.merging.shards import FLOATS
from tasks.merging.stored import StoredTensor, unpack

_SHARED = "holds it together with others, and a merge is not written into a part of a tensor: choose another base model"
_HOW = "its layout in the files is not one that a merge can be written in: choose a checkpoint as transformers saves it"


@dataclass
class Sources:
    """The stored tensors that a tensor of the model is made of."""

    converter: Any = None
    """transformers' rule, or none where the one tensor is taken as it is."""
    patterns: dict[str, list[StoredTensor]] = field(default_factory=dict)
    """By the rule's source patterns, in the order of experts."""
    first_row: int = 0
    """In the stored tensor, where that holds several of the model one after the other."""

    @property
    def tensors(self) -> list[StoredTensor]:
        """All of them."""
        return [tensor for group in self.patterns.values() for tensor in group]


def find_sources(skeleton: Any, stored: Mapping[str, StoredTensor]) -> dict[str, Sources]:
    """Return for each tensor of a model the stored ones that it is made of.

    Args:
        skeleton: the model, without values; nothing attached.
        stored: the checkpoint's tensors by name.
    """
    rules = get_model_conversion_mapping(skeleton)
    renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    names = skeleton.state_dict()
    prefix = skeleton.base_model_prefix
    sources: dict[str, Sources] = {}
    for key in sorted(stored, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = loading.rename_source_key(key, [], [], prefix, names)
        found = sources.setdefault(name, Sources(by_pattern.get(pattern or "")))
        found.patterns.setdefault(pattern or "", []).append(stored[key])
    for name, found in list(sources.items()):
        sources.update(_take_apart(name, found, names))
    return sources


def _take_apart(name: str, whole: Sources, names: Mapping[str, Any]) -> dict[str, Sources]:
    """Return the tensors of the model that one stored tensor, or one list of experts, is taken apart into; or nothing.

    Args:
        name: of the first of them.
        whole: its sources.
        names: the model's tensors.
    """
    if whole.converter is None or len(targets := whole.converter.target_patterns) < 2:
        return {}
    if type(whole.converter.operations[0]) is loading.ErnieFuseAndSplitTextVisionExperts:
        return _share_out_experts(name, whole)
    if (dim := find_dim(whole.converter.operations)) is None:
        return {}
    parts: dict[str, Sources] = {}
    first = 0
    for target in targets:
        part = name.replace(targets[0], target)
        if part not in names:
            return {}
        parts[part] = replace(whole, first_row=first)
        first += names[part].shape[dim]
    return parts


def _share_out_experts(name: str, whole: Sources) -> dict[str, Sources]:
    """Return the sources of experts that are stored in one list: those for text come first, then those for images."""
    targets = whole.converter.target_patterns
    operation = whole.converter.operations[0]
    shared = {}
    for number, target in enumerate(targets):
        own = {}
        for pattern, tensors in whole.patterns.items():
            size = -(-len(tensors) // len(targets))
            own[pattern] = tensors[number * size : (number + 1) * size]
        operations = [loading.MergeModulelist(operation.stack_dim), loading.Concatenate(operation.concat_dim)]
        rule = loading.WeightConverter(whole.converter.source_patterns, target, operations[: len(own)])
        shared[name.replace(targets[0], target)] = Sources(rule, own)
    return shared


def divide_change(name: str, change: Change, sources: Sources) -> dict[str, StoredChange]:
    """Return the change of each stored tensor that a tensor of the model is made of.

    Args:
        name: of the tensor in the model.
        change: of it.
        sources: of `find_sources`.

    Raises:
        MergeError: the layout is not understood, or the shapes do not fit.
    """
    operations = list(sources.converter.operations) if sources.converter is not None else []
    if operations and (dim := find_dim(operations)) is not None and len(sources.tensors) == 1:
        (tensor,) = sources.tensors
        if dim >= len(tensor.shape) or sources.first_row + change.shape[dim] > tensor.shape[dim]:
            raise MergeError(f"{name}: {tensor.name} in the files is {list(tensor.shape)}: {_HOW}")
        places = find_places(operations, tensor.shape[dim], sources.first_row, change.shape[dim])
        return {tensor.name: Joined((RowsChange(change, places, dim),))}
    if operations and len(sources.converter.target_patterns) > 1:
        raise MergeError(f"{name}: {sources.tensors[0].name} in the files {_SHARED}")
    groups = _order(sources)
    parts: list[Any] = [change]
    for operation in reversed(operations):
        if isinstance(operation, loading.Concatenate):
            parts = _split(name, parts, groups, operation.dim)
        elif isinstance(operation, loading.MergeModulelist) and operation.dim == 0:
            parts = [part.unstack() for part in parts]
        elif isinstance(operation, loading.Transpose) and _swaps_last(operation, change):
            if not operation.check_dims or groups[0][0].shape != change.shape:
                parts = [part.transpose() for part in parts]
        else:
            raise MergeError(f"{name}: {_HOW}")
    divided: dict[str, StoredChange] = {}
    for group, part in zip(groups, parts, strict=True):
        pieces = part if isinstance(part, list) else [part]
        if len(pieces) != len(group):
            raise MergeError(f"{name}: {len(group)} tensors are stored for {len(pieces)} experts: {_HOW}")
        divided.update({tensor.name: piece for tensor, piece in zip(group, pieces, strict=True)})
    return divided


def join_changes(known: StoredChange | None, change: StoredChange) -> StoredChange:
    """Return the change of a stored tensor, of which a part may have one already."""
    return known.join(change) if isinstance(known, Joined) and isinstance(change, Joined) else change


def check_layout(
    skeleton: Any, stored: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], *, is_whole: bool = False
) -> dict[str, Sources]:
    """Refuse a checkpoint into which a change of the given weights could not be written; return `find_sources`.

    Args:
        skeleton: the model, without values; nothing attached.
        stored: the checkpoint's tensors by name.
        shapes: of the weights that would change, by their names in the model.
        is_whole: new values take their place, else low-rank changes are added.

    Raises:
        MergeError: a weight is not among the files, is quantized, or has a layout that is not understood.
    """
    sources = find_sources(skeleton, unpack(stored))
    ties: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    for name, shape in shapes.items():
        found = sources.get(name) or sources.get(ties.get(name, ""))
        if found is None:
            raise name_missing(sources, skeleton, name)
        quantized = next((tensor for tensor in found.tensors if tensor.dtype not in FLOATS), None)
        if quantized is not None:
            raise MergeError(
                f"{quantized.name}: the base model stores {quantized.dtype}, and what is trained is merged into full "
                "weights: choose the unquantized model (float32, bfloat16 or float16)"
            )
        if is_whole:
            divide_change(name, Replacement(torch.empty(shape, device="meta")), found)
            continue
        *experts, num_out, num_in = shape
        a, b = (torch.empty((*experts, *sides), device="meta") for sides in ((1, num_in), (num_out, 1)))
        divide_change(name, LowRank(a, b, 1.0), found)
    return sources


def _order(sources: Sources) -> list[list[StoredTensor]]:
    """Return the groups of stored tensors in the order of the rule's patterns."""
    if sources.converter is None:
        return list(sources.patterns.values())
    return [sources.patterns[pattern] for pattern in sources.converter.source_patterns if pattern in sources.patterns]


def _split(name: str, parts: list[Any], groups: Sequence[Sequence[StoredTensor]], dim: int) -> list[Any]:
    """Cut one change into those of groups that lie one after the other."""
    (whole,) = parts
    if not isinstance(whole, LowRank | Replacement):
        raise MergeError(f"{name}: {_HOW}")
    dims = len(whole.shape)
    if dims - dim not in (1, 2):
        raise MergeError(f"{name}: {_HOW}")
    # A stored tensor of one expert lacks the first dimension.
    sizes = [group[0].shape[dim - dims] for group in groups]
    if sum(sizes) != whole.shape[dim]:
        raise MergeError(f"{name}: {_HOW}")
    return list(whole.split(sizes, dim=dim - dims))


def _swaps_last(operation: Any, change: Change) -> bool:
    """Say whether a transposition is that of a matrix, or of each expert's."""
    dims = len(change.shape)
    return {operation.dim0 % dims, operation.dim1 % dims} == {dims - 2, dims - 1}


def name_missing(sources: Mapping[str, Sources], skeleton: nn.Module, name: str) -> MergeError:
    """Return the error for a changed tensor that no stored one makes."""
    quantization = getattr(getattr(skeleton, "config", None), "quantization_config", None)
    how = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if how and how != "mxfp4":
        return MergeError(
            f"{name}: this checkpoint is quantized ({how}), and what is trained is merged into full weights: choose "
            "the unquantized model (float32, bfloat16 or float16)"
        )
    whole = _find_whole(sources, name)
    if whole is not None:
        return MergeError(f"{name}: {whole.name} in the files {_SHARED}")
    return MergeError(
        f"{name}: none of the base model's {len(sources)} stored weights is this one of {type(skeleton).__name__}: "
        "fetch the whole checkpoint again, unquantized (float32, bfloat16 or float16)"
    )


def _find_whole(sources: Mapping[str, Sources], name: str) -> StoredTensor | None:
    """Return the stored tensor of which a tensor of the model is a part, but not the first one; None if of none."""
    for first_name, found in sources.items():
        first, *others = found.converter.target_patterns if found.converter is not None else [""]
        if any(first_name.replace(first, other) == name for other in others):
            return found.tensors[0]
    return None
