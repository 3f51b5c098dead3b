"""Checks that a base model and a training's settings fit, before anything is read, evaluated or trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from schemas.config import RunConfig, TrainingConfig
from schemas.plurals import count_of
from tasks.families.reading import check_reads_text
from tasks.families.registry import explain_refused
from tasks.merging.changes import build_skeleton
from tasks.merging.names import Sources, check_layout
from tasks.merging.shards import FLOATS, read_headers
from tasks.merging.stored import StoredTensor, unpack
from tasks.models import check_headers
from tasks.tokenization.templates import prepare_tokenizer
from tasks.tokenization.vocabulary import check_vocabulary
from tasks.training.lora import plan_adapter
from tasks.training.own_weights import advise_learning_rate, plan_weights

_OTHER_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip
_MATRIX = 2


def check_run(folder: Path, config: RunConfig) -> tuple[str, ...]:
    """Refuse what a stage would refuse hours later; return what a person should think about.

    Args:
        folder: of the base model.
        config: of the run.

    Raises:
        ValueError: as `check_model`, or the tokenizer and its template cannot be used with this model.
    """
    advice = check_model(folder, config.training)
    prepared = prepare_tokenizer(folder, config.model.chat_template, config.tokenization.template_arguments)
    embeddings: Any = build_skeleton(folder).get_input_embeddings()
    return (*advice, *check_vocabulary(prepared, folder, int(embeddings.weight.shape[0])))


def check_model(folder: Path, config: TrainingConfig) -> tuple[str, ...]:
    """Refuse what the loading, the training or the merge would refuse hours later; return what to think about.

    Args:
        folder: of the base model.
        config: the training section.

    Raises:
        MergeError: no language model is described there, or its files cannot be merged into.
        FamilyError: the model wants more than text.
        TrainingError: a setting does not go with this model; the message says what would do.
        ModelError: the files' weights are not exactly those of the model.
    """
    skeleton = build_skeleton(folder)
    if not explain_refused(skeleton.config):  # whose reason says more
        check_reads_text(skeleton)
    stored = read_headers(folder)
    if config.is_lora:
        adapted = {weight.name: weight.shape for weight in plan_adapter(skeleton, config).adapted}
        sources = check_layout(skeleton, stored, adapted)
    else:
        trained = {weight.name: weight.shape for weight in plan_weights(skeleton, config) if not weight.skipped}
        sources = check_layout(skeleton, stored, trained, is_whole=True)
    check_headers(folder, {name: _without_values(tensor) for name, tensor in unpack(stored).items()})
    advice = "" if config.is_lora else advise_learning_rate(config)
    return tuple(filter(None, (advice, _name_left_out(skeleton, sources))))


def _without_values(tensor: StoredTensor) -> torch.Tensor:
    dtype = {**FLOATS, **_OTHER_DTYPES}.get(tensor.dtype, torch.uint8)
    return torch.empty(tensor.shape, dtype=dtype, device="meta")


def _name_left_out(skeleton: Any, sources: Mapping[str, Sources]) -> str:
    """Say which weights of the files transformers leaves out, such as layers that draft tokens (MTP); empty if none."""
    known = skeleton.state_dict().keys()
    names = [
        tensor.name
        for name, found in sources.items()
        if name not in known
        for tensor in found.tensors
        if tensor.dtype in FLOATS and len(tensor.shape) == _MATRIX
    ]
    if not names:
        return ""
    return (
        f"{count_of(len(names), 'matrix of the files is', 'matrices of the files are')} no part of "
        f"{type(skeleton).__name__} in transformers, such as {min(names)} (often layers that draft tokens): not "
        "trained, and in the merged model as in the base"
    )
