"""The adapter: LoRA matrices beside the frozen linear layers (Hu et al., 2021), through PEFT.

The adapted layer computes y = W x + s B A x, with A [r, in], B [out, r] and s = alpha / r (alpha / sqrt(r) for rsLoRA).
B starts at zero, so that the first forward pass is the base model's. Routed experts that lie in one parameter
[E, out, in] have an A and a B each; PEFT keeps them as one A [E r, in] and one B [out, r E].
"""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import transformers_weight_conversion as peft_conversion
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.config import TrainingConfig
from schemas.plurals import count_of
from tasks.decoder.across import can_divide
from tasks.families.adaptation import EMBEDDINGS, HEAD, AdaptationPlan, plan_adaptation
from tasks.families.classes import FamilyError
from tasks.training.checkpoints import publish_folder
from tasks.training.records import TrainingError


def plan_adapter(model: PreTrainedModel, config: TrainingConfig) -> AdaptationPlan:
    """Decide which weights the adapter stands beside, and check that the config's other settings go with them.

    Args:
        model: with or without values (meta device).
        config: the training section.

    Raises:
        TrainingError: a named module is not in the model, a setting does not go with experts, or the model has not the
            heads for processes that share examples.
    """
    _check_heads(model, config)
    try:
        plan = plan_adaptation(model, config.target_modules)
    except FamilyError as error:
        raise TrainingError(str(error)) from error
    _check_names(model, config.modules_to_save)
    _check_experts(model, plan, config)
    return plan


def _check_heads(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Refuse what `engines.shared_tokens` would, where the model's config already says so."""
    size = config.context_parallel
    if size == 1:
        return
    # As a dict: a config whose layers differ in such a number (Gemma 4) does not give it as an attribute.
    text = model.config.get_text_config().to_dict()
    heads = int(text.get("num_attention_heads") or 0)
    keys = int(text.get("num_key_value_heads") or heads)
    if heads and not can_divide(heads, keys, size):
        raise TrainingError(
            f"training.context_parallel is {size}, and the model's {heads} heads with {keys} of keys cannot be divided "
            f"among {size} processes: set it to a number that divides both, or to 1"
        )


def build_lora_config(model: PreTrainedModel, plan: AdaptationPlan, config: TrainingConfig) -> LoraConfig:
    """Translate plan and config to PEFT's, with each weight by its whole name."""
    # A tied head and embedding are one tensor: trained apart, they would drift, and the merged model could hold one.
    touched = {name.rsplit(".", 1)[-1] for name in (*plan.modules, *config.modules_to_save)}
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=config.dropout,
        target_modules=list(plan.modules),
        target_parameters=list(plan.parameters) or None,
        modules_to_save=list(config.modules_to_save) or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        ensure_weight_tying=is_tied and bool(touched & _name_embeddings(model)),
    )


def attach_adapter(model: PreTrainedModel, config: TrainingConfig, *, seed: int) -> PeftModel:
    """Freeze the model, put a fresh adapter beside its layers, and return both.

    The start is drawn from the seed; what is trained is fp32 whatever the base's dtype, because AdamW's small updates
    would be lost in 16 bits. The caller's random state is not touched.

    Raises:
        TrainingError: see `plan_adapter`; or what PEFT attached is not what was planned.
    """
    plan = plan_adapter(model, config)
    lora_config = build_lora_config(model, plan, config)
    with torch.random.fork_rng(devices=[]), _literal_targets():
        torch.manual_seed(seed)
        adapted: PeftModel = get_peft_model(model, lora_config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    _check_attached(adapted, plan)
    _name_for_loading(adapted, plan)
    return adapted


def attach_further(adapted: PeftModel, name: str, config: TrainingConfig, *, seed: int) -> None:
    """Put a further adapter of another rank beside the same layers; it starts as it would by itself.

    Args:
        adapted: of `attach_adapter`.
        name: of the adapter.
        config: the training section, whose target_modules are those of the first one.
        seed: of its start.
    """
    settings: Any = copy.deepcopy(adapted.peft_config["default"])
    settings.r, settings.lora_alpha = config.rank, config.alpha
    with torch.random.fork_rng(devices=[]), _literal_targets():
        torch.manual_seed(seed)
        adapted.add_adapter(name, settings)
    for parameter_name, parameter in adapted.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()


def list_adapters(adapted: PeftModel, name: str) -> dict[nn.Linear, tuple[nn.Parameter, nn.Parameter, float]]:
    """Return the matrices A and B and the scale of one adapter, by the linear layer that they stand beside."""
    found: dict[nn.Linear, tuple[nn.Parameter, nn.Parameter, float]] = {}
    for module in adapted.modules():
        matrices: Any = getattr(module, "lora_A", None)
        if matrices is not None and name in matrices:
            layer: Any = module
            found[layer.base_layer] = (matrices[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))
    return found


def save_named(adapted: PeftModel, name: str, folder: Path) -> Path:
    """Write one of several adapters as `save_adapter` writes a single one."""
    partial = folder.parent / f".partial-{folder.name}"
    shutil.rmtree(partial, ignore_errors=True)
    adapted.save_pretrained(str(partial), save_embedding_layers=False, selected_adapters=[name])
    written = partial if name == "default" else partial / name
    _sort_modules(written / "adapter_config.json")
    publish_folder(written, folder)
    shutil.rmtree(partial, ignore_errors=True)
    return folder


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
    _sort_modules(partial / "adapter_config.json")
    publish_folder(partial, folder)
    return folder


def name_adapted(model: nn.Module) -> set[str]:
    """Return the names, in the base model, of the weights that have LoRA matrices."""
    names = set()
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and (len(module.lora_A) or len(module.lora_embedding_A)):
            inside = path.removeprefix("base_model.model.").replace(".base_layer", "")
            names.add(f"{inside}.{getattr(module, 'parameter_name', 'weight')}")
    return names


@contextmanager
def _literal_targets() -> Iterator[None]:
    """Have PEFT take names as they are.

    For some families it takes any gate_proj, up_proj or down_proj for one of the routed experts, as checkpoints of
    earlier versions of transformers have them, and leaves out dense layers and shared experts of that name.
    """
    convert = peft_conversion.convert_peft_config_for_transformers
    peft_conversion.convert_peft_config_for_transformers = lambda *args, **settings: None
    try:
        yield
    finally:
        peft_conversion.convert_peft_config_for_transformers = convert


def _name_for_loading(adapted: PeftModel, plan: AdaptationPlan) -> None:
    """Name the targets so that PEFT finds them when it loads the adapter, whatever it makes of names then.

    A layer whose name PEFT would take for an expert's is named by its weight: the matrices have the same names and
    shapes.
    """
    base: Any = adapted.get_base_model()
    settings: Any = adapted.peft_config["default"]
    probe = LoraConfig(target_modules=list(plan.modules), target_parameters=list(plan.parameters) or None)
    peft_conversion.convert_peft_config_for_transformers(probe, base, None)
    taken = sorted(set(plan.modules) - set(probe.target_modules or ()))
    if taken:
        settings.target_modules = {path for path in plan.modules if path not in taken}
        settings.target_parameters = {*plan.parameters, *(f"{path}.weight" for path in taken)}
        settings.lora_dropout = 0.0  # PEFT adapts a parameter without it, and it ends with the training


def _check_attached(adapted: PeftModel, plan: AdaptationPlan) -> None:
    """Raise TrainingError unless exactly the planned weights have trained LoRA matrices."""
    wanted, found = {weight.name for weight in plan.adapted}, name_adapted(adapted)
    ends = {weight.name for weight in plan.weights if weight.kind in (EMBEDDINGS, HEAD)}
    if wanted & ends:  # PEFT adapts tied ones together
        wanted, found = wanted - ends, found - ends
    still = [name for name, value in adapted.named_parameters() if ".lora_" in name and not value.requires_grad]
    if wanted != found or still:
        odd = sorted(wanted ^ found) or still
        raise TrainingError(
            "PEFT attached another adapter than was planned: "
            f"{count_of(len(odd), 'weight differs', 'weights differ')}, such as {odd[0]}: name "
            "training.target_modules one by one, without them"
        )


def _check_experts(model: PreTrainedModel, plan: AdaptationPlan, config: TrainingConfig) -> None:
    """Raise TrainingError for settings that PEFT does not have for parameters."""
    setting = "dropout" if config.dropout else "use_dora" if config.use_dora else ""
    if plan.parameters and setting:
        names = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in plan.modules}))
        raise TrainingError(
            f"training.{setting} is {getattr(config, setting)}, which does not go with weights of this "
            f"{type(model).__name__} that are parameters without a layer of their own (such as {plan.parameters[0]}): "
            f"set training.{setting} to {0 if config.dropout else 'false'}, or leave them out: "
            f"training.target_modules of {names}"
        )


def _sort_modules(file: Path) -> None:
    """Write the names of modules in order: PEFT holds them as a set, whose order is another one in every process."""
    values = json.loads(file.read_text(encoding="utf-8"))
    for key in ("target_modules", "target_parameters", "exclude_modules"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _name_values(model: PeftModel, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's state with the given values for what is trained; a tied one has several names."""
    names = {parameter: name for name, parameter in collect_trained(model).items() if name in trained}
    everything = model.named_parameters(remove_duplicate=False)
    return {**model.state_dict(), **{name: trained[names[value]] for name, value in everything if value in names}}


def _name_embeddings(model: PreTrainedModel) -> set[str]:
    """Return the short names of the embedding and the output head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if any(module is end for end in ends)}


def _check_names(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Raise TrainingError unless each of modules_to_save ends the dotted path of a module (PEFT's own rule)."""
    paths = [path for path, _ in model.named_modules() if path]
    unknown = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if unknown:
        known = sorted({path.rsplit(".", 1)[-1] for path in paths if not path.rsplit(".", 1)[-1].isdigit()})
        raise TrainingError(
            f"training.modules_to_save names {', '.join(map(repr, unknown))}, which are not in this "
            f"{type(model).__name__}: choose from {', '.join(known)}"
        )
