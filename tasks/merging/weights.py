"""Merge: W + s B A in fp32, cast once to the base's stored dtype, tensor by tensor from file to file.

Nothing but the adapter and some blocks of rows are in memory, and what the adapter does not touch is copied as it is.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tasks.merging.changes import Change, LowRank, MergeError, Replacement, build_skeleton, read_changes
from tasks.merging.companions import copy_companions
from tasks.merging.shards import FLOATS, PlannedTensor, StoredTensor, read_headers, write_shards
from tasks.models import load_model

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def merge_adapter(
    base_model: Path,
    adapter: Path,
    tokenizer: Path,
    folder: Path,
    *,
    max_shard_size: str,
    card: Mapping[str, str] | None = None,
) -> None:
    """Write the merged model: weights, config, generation config, tokenizer and model card.

    Args:
        base_model: folder with config.json and safetensors weights.
        adapter: folder of a LoRA adapter in PEFT's format.
        tokenizer: folder of the tokenizer as it ships, with template, pad and end of turn.
        folder: gets the model; must be new or empty.
        max_shard_size: of a safetensors file, such as 500MB or 5GB; a larger tensor has a file of its own.
        card: what the model card tells, such as base_model and dataset_digest.

    Raises:
        MergeError: base and adapter do not fit, a file cannot be read, or a merged weight is not finite.
    """
    if folder.exists() and any(folder.iterdir()):
        raise MergeError(f"{folder}: is not empty: give a new folder for the merged model")
    folder.mkdir(parents=True, exist_ok=True)
    limit = parse_size(max_shard_size)
    stored = read_headers(base_model)
    changes = read_changes(adapter, base_model)
    unties = False
    plan = None if changes is None else _plan(base_model, stored, changes)
    if plan is None:
        _merge_through_peft(base_model, adapter, folder, stored, max_shard_size)
    else:
        unties = any(tensor.name not in stored for tensor in plan)
        write_shards(plan, folder, limit)
    copy_companions(base_model, tokenizer, folder, card or {}, unties=unties)


def parse_size(text: str) -> int:
    """Return a size such as 500MB (10**6 bytes each, as the hub counts) in bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text)
    if not match or float(match[1]) == 0:
        raise MergeError(f"merge.max_shard_size is {text!r}: write a size such as 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])


def _plan(
    base_model: Path, stored: Mapping[str, StoredTensor], changes: Mapping[str, Change]
) -> list[PlannedTensor] | None:
    """Give each tensor of the base its change; None when a changed one is not stored under its name.

    Of tied tensors the checkpoint holds one. When both are changed alike they stay tied; a head changed alone is
    written as a tensor of its own, made from the one that it was tied to.
    """
    ties: dict[str, str] = getattr(build_skeleton(base_model), "all_tied_weights_keys", {})
    plan = [PlannedTensor(name, tensor, changes.get(name)) for name, tensor in stored.items()]
    for name in changes.keys() - stored.keys():
        source = ties.get(name, "")
        if source not in stored:
            return None
        if not _is_same(changes[name], changes.get(source)):
            plan.append(PlannedTensor(name, stored[source], changes[name]))
    for tensor in plan:
        if tensor.change is not None:
            _check_fit(tensor, tensor.change)
    return plan


def _is_same(left: Change, right: Change | None) -> bool:
    """Say whether two tied tensors were replaced by the same values."""
    return isinstance(left, Replacement) and isinstance(right, Replacement) and torch.equal(left.values, right.values)


def _check_fit(tensor: PlannedTensor, change: Change) -> None:
    """Raise MergeError unless the change has the base tensor's shape and a dtype to cast to."""
    source = tensor.source
    shape = (change.b.shape[0], change.a.shape[1]) if isinstance(change, LowRank) else tuple(change.values.shape)
    if shape != source.shape:
        raise MergeError(
            f"{tensor.name}: the adapter's shape is {list(shape)}, but the base model's is {list(source.shape)}: "
            "this adapter was trained on another base model"
        )
    if source.dtype not in FLOATS:
        raise MergeError(
            f"{tensor.name}: the base model stores {source.dtype}: merge into the unquantized model (float32, "
            "bfloat16 or float16)"
        )


def _merge_through_peft(
    base_model: Path, adapter: Path, folder: Path, stored: Mapping[str, StoredTensor], max_shard_size: str
) -> None:
    """Let PEFT merge the whole model in fp32 memory, cast each tensor once, and save it."""
    model: Any = load_model(base_model, dtype=torch.float32)
    try:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    except Exception as error:
        raise MergeError(f"{adapter}: PEFT cannot merge this adapter into {base_model} ({error})") from error
    main = max(FLOATS, key=lambda dtype: sum(t.num_bytes for t in stored.values() if t.dtype == dtype))
    for name, parameter in model.named_parameters():
        source = stored.get(name)
        dtype = FLOATS[source.dtype if source is not None and source.dtype in FLOATS else main]
        if not bool(parameter.to(dtype).isfinite().all()):
            raise MergeError(f"{name}: NaN or infinity after merging into {dtype}: the training diverged")
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(folder), max_shard_size=max_shard_size)
    for leftover in ("config.json", "generation_config.json"):
        (folder / leftover).unlink(missing_ok=True)
