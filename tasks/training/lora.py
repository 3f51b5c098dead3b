"""The adapter: LoRA matrices beside the frozen linear layers (Hu et al., 2021), through PEFT.

The adapted layer computes y = W x + s B A x, with A [r, in], B [out, r] and s = alpha / r (alpha / sqrt(r) for rsLoRA).
B starts at zero, so that the first forward pass is the base model's.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.config import TrainingConfig
from tasks.training.checkpoints import publish_folder
from tasks.training.records import TrainingError


def build_lora_config(model: PreTrainedModel, config: TrainingConfig) -> LoraConfig:
    """Translate the config to PEFT's, after checking that every named module exists.

    Raises:
        TrainingError: a target module or module to save is not in the model; the message lists those that are.
    """
    all_linear = config.target_modules == ("all-linear",)
    if not all_linear:
        _check_names(model, config.target_modules, "target_modules", kinds=(nn.Linear, nn.Embedding))
    _check_names(model, config.modules_to_save, "modules_to_save", kinds=(nn.Module,))
    # A tied head and embedding are one tensor: trained apart, they would drift, and the merged model could hold one.
    touched = {name.rsplit(".", 1)[-1] for name in (*config.target_modules, *config.modules_to_save)}
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=config.dropout,
        target_modules="all-linear" if all_linear else list(config.target_modules),
        # In a composite, what lies outside the text decoder sees no token of a text run: its adapter would stay empty.
        exclude_modules=rf"(?!{re.escape(text_part)}\.).*" if (text_part := _find_text_part(model)) else None,
        modules_to_save=list(config.modules_to_save) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        ensure_weight_tying=is_tied and bool(touched & _name_embeddings(model)),
    )


def attach_adapter(model: PreTrainedModel, config: TrainingConfig, *, seed: int) -> PeftModel:
    """Freeze the model, put a fresh adapter beside its layers, and return both.

    The start is drawn from the seed; what is trained is fp32 whatever the base's dtype, because AdamW's small updates
    would be lost in 16 bits. The caller's random state is not touched.
    """
    lora_config = build_lora_config(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, lora_config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def collect_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, folder: Path, trained: Mapping[str, Tensor] | None = None) -> Path:
    """Write the adapter in PEFT's format (fp32 safetensors), whole or not at all; return the folder.

    Args:
        model: says what belongs to the adapter.
        folder: is replaced where there is one.
        trained: values by the names of `collect_trained`; those that the model holds when None.
    """
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    # The base's own embedding belongs to the base; an embedding that was trained is saved in any case.
    model.save_pretrained(str(partial), save_embedding_layers=False, state_dict=_name_values(model, trained or {}))
    publish_folder(partial, folder)
    return folder


def _name_values(model: PeftModel, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's state with the given values for what is trained; a tied one has several names."""
    names = {parameter: name for name, parameter in collect_trained(model).items() if name in trained}
    everything = model.named_parameters(remove_duplicate=False)
    return {**model.state_dict(), **{name: trained[names[value]] for name, value in everything if value in names}}


def _find_text_part(model: PreTrainedModel) -> str:
    """Return the path of the text decoder inside a composite model; empty for a text model."""
    paths = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] == "language_model"]
    return min(paths, key=len) if paths else ""


def _name_embeddings(model: PreTrainedModel) -> set[str]:
    """Return the short names of the embedding and the output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is end for end in ends)}


def _check_names(
    model: PreTrainedModel, names: tuple[str, ...], setting: str, *, kinds: tuple[type[nn.Module], ...]
) -> None:
    """Raise TrainingError unless each name ends the dotted path of a module of the kinds (PEFT's own rule)."""
    paths = [path for path, module in model.named_modules() if path and isinstance(module, kinds)]
    unknown = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if unknown:
        known = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()})
        raise TrainingError(
            f"training.{setting} names {', '.join(map(repr, unknown))}, which are not in this {type(model).__name__}: "
            f"choose from {', '.join(known)}" + (", or all-linear alone" if setting == "target_modules" else "")
        )
