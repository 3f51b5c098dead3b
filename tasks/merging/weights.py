"""Merge: W + s B A in fp32, or the trained weights, cast once to the base's stored dtype, from file to file.

Nothing but the adapter and some blocks of rows are in memory, and what the adapter does not touch is copied as it is.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tasks.merging.changes import Change, MergeError, Replacement, build_skeleton
from tasks.merging.companions import copy_companions
from tasks.merging.joined import StoredChange, find_dim
from tasks.merging.names import Sources, divide_change, find_sources, join_changes, name_missing
from tasks.merging.shards import FLOATS, PlannedTensor, read_headers, write_shards
from tasks.merging.stored import PackedTensor, unpack
from tasks.merging.trained_models import read_trained_changes, read_trained_config

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def merge_adapter(
    base_model: Path,
    adapter: Path,
    tokenizer: Path,
    folder: Path,
    *,
    max_shard_size: str,
    card: Mapping[str, str] | None = None,
) -> list[PlannedTensor]:
    """Write the merged model: weights, config, generation config, tokenizer and model card.

    Args:
        base_model: folder with config.json and safetensors weights.
        adapter: folder of a LoRA adapter in PEFT's format, or of trained weights.
        tokenizer: folder of the tokenizer as it ships, with template, pad and end of turn.
        folder: gets the model; must be new or empty.
        max_shard_size: of a safetensors file, such as 500MB or 5GB; a larger tensor has a file of its own.
        card: what the model card tells, such as base_model and dataset_digest.

    Returns:
        What was written, tensor by tensor.

    Raises:
        MergeError: base and adapter do not fit, a file cannot be read, or a merged weight is not finite.
    """
    if folder.exists() and any(folder.iterdir()):
        raise MergeError(f"{folder}: is not empty: give a new folder for the merged model")
    folder.mkdir(parents=True, exist_ok=True)
    limit = parse_size(max_shard_size)
    plan = plan_merge(base_model, adapter)
    write_shards(plan, folder, limit)
    stored = {tensor.source.name for tensor in plan}
    told = {"method": str(read_trained_config(adapter)["method"]), **(card or {})}
    copy_companions(
        base_model,
        tokenizer,
        folder,
        told,
        unties=any(tensor.name not in stored for tensor in plan),
        unpacks=any(isinstance(tensor.source, PackedTensor) for tensor in plan),
    )
    return plan


def plan_merge(base_model: Path, adapter: Path) -> list[PlannedTensor]:
    """Give each tensor of the base its change.

    Of tied tensors the checkpoint holds one. When both are changed alike they stay tied; a head changed alone is
    written as a tensor of its own, made from the one that it was tied to. Packed experts stay so unless some change.

    Raises:
        MergeError: base and adapter do not fit, or the base's files have a layout that is not understood.
    """
    stored = read_headers(base_model)
    unpacked = unpack(stored)
    skeleton: Any = build_skeleton(base_model)
    ties: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    sources = find_sources(skeleton, unpacked)
    changes = read_trained_changes(adapter, skeleton)
    by_stored: dict[str, StoredChange] = {}
    apart: list[PlannedTensor] = []
    for name, change in changes.items():
        if name in sources:
            _check_fit(name, change, sources[name])
            for stored_name, part in divide_change(name, change, sources[name]).items():
                by_stored[stored_name] = join_changes(by_stored.get(stored_name), part)
            continue
        tied = ties.get(name, "")
        if tied not in sources:
            raise name_missing(sources, skeleton, name)
        _check_fit(name, change, sources[tied])
        if not _is_same(change, changes.get(tied)):
            apart.append(PlannedTensor(name, sources[tied].tensors[0], change))
    if any(
        isinstance(unpacked[name], PackedTensor) for name in by_stored
    ):  # a config says of all experts alike how they are packed
        stored = unpacked
    plan = [PlannedTensor(name, tensor, by_stored.get(name)) for name, tensor in stored.items()]
    return [*plan, *apart]


def parse_size(text: str) -> int:
    """Return a size such as 500MB (10**6 bytes each, as the hub counts) in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if not match or float(match[1]) == 0:
        raise MergeError(f"merge.max_shard_size is {text!r}: write a size such as 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def _is_same(left: Change, right: Change | None) -> bool:
    """Say whether two tied tensors were replaced by the same values."""
    return isinstance(left, Replacement) and isinstance(right, Replacement) and torch.equal(left.values, right.values)


def _check_fit(name: str, change: Change, sources: Sources) -> None:
    """Raise MergeError unless the stored tensors have as many values as the change, and a dtype to cast to."""
    for tensor in sources.tensors:
        if tensor.dtype not in FLOATS:
            raise MergeError(
                f"{tensor.name}: the base model stores {tensor.dtype}: merge into the unquantized model (float32, "
                "bfloat16 or float16)"
            )
    shapes = [tensor.shape for tensor in sources.tensors]
    if sources.converter is None and shapes != [change.shape]:
        raise MergeError(
            f"{name}: the adapter's shape is {list(change.shape)}, but the base model's is {list(shapes[0])}: "
            "this adapter was trained on another base model"
        )
    if sources.converter is not None and find_dim(sources.converter.operations) is not None:
        return  # a part of a tensor, which `divide_change` looks at
    if sum(math.prod(shape) for shape in shapes) != math.prod(change.shape):
        raise MergeError(
            f"{name}: the adapter's shape is {list(change.shape)}, but the base model's files hold "
            f"{len(shapes)} tensors such as {list(shapes[0])} for it: this adapter was trained on another base model"
        )
