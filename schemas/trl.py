"""TRL's YAML of an SFT script (`trl sft --config`) in our terms: SFTConfig, ModelConfig and the script's arguments.

A file is a flat mapping of keys; keys that are not given have TRL's defaults, not ours. Its arguments of training are
those of transformers, which LLaMA-Factory has too.
"""

from pathlib import Path
from typing import Any

from schemas.llamafactory.keys import IMPLIED, NOT_DONE, REFUSED
from schemas.llamafactory.lines import NOT_GIVEN, Work, to_flag, to_names, to_number, to_whole
from schemas.llamafactory.settings import SETTINGS, Setting
from schemas.llamafactory.training import (
    put_all,
    read_batch,
    read_evaluations,
    read_kept,
    read_name,
    read_optimizer,
    read_reports,
    read_schedule,
    read_steps,
    read_strategy,
)

_LORA: dict[str, Setting] = {
    "lora_r": Setting("training.rank", to_whole, 16),
    "lora_alpha": Setting("training.alpha", to_number, 32.0),
    "lora_dropout": Setting("training.dropout", to_number, 0.05),
    "lora_modules_to_save": Setting("training.modules_to_save", to_names),
    "use_rslora": Setting("training.use_rslora", to_flag, False),
    "use_dora": Setting("training.use_dora", to_flag, False),
}
_SHARED = (
    "model_name_or_path", "seed", "weight_decay", "max_grad_norm", "num_train_epochs", "save_steps", "save_total_limit",
)  # fmt: skip
_SETTINGS: dict[str, Setting] = {
    **{key: SETTINGS[key] for key in _SHARED},
    "learning_rate": Setting("training.learning_rate", to_number, 2e-5),
    "max_length": Setting("tokenization.max_length", to_whole, 1024),
    "dataset_config": Setting("data.subset", str),
}
_IMPLIED = {
    **dict.fromkeys(("attn_implementation", "use_liger_kernel", "torch_dtype", "dtype"), "chosen by the machine"),
    **dict.fromkeys(
        ("assistant_only_loss", "completion_only_loss"), "only what the assistant says is trained, whatever the format"
    ),
    **dict.fromkeys(("dataset_num_proc", "dataset_kwargs", "dataset_text_field"), "the format is found by the columns"),
    **dict.fromkeys(
        ("packing_strategy", "padding_free", "eval_packing", "pad_to_multiple_of"), "padding costs nothing here"
    ),
    **dict.fromkeys(("eos_token", "pad_token"), "the template's end of turn is trained, and pad tokens never are"),
    **dict.fromkeys(
        ("lora_task_type", "loss_type", "activation_offloading", "ignore_bias_buffers"), "of no effect here"
    ),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), "4 bits are NF4 here"),
    "gradient_checkpointing_kwargs": "activations are recomputed where the memory asks for it",
}
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "load_in_8bit": ((False,), "4 bits (load_in_4bit) are what there is; training.base_weights knows fp8"),
    "dataset_streaming": ((False,), "datasets are read whole, with little memory"),
    "lora_target_parameters": ((), "name the experts' weights in lora_target_modules"),
    "truncation_mode": (("keep_start",), "prompts are cut inside their contents, and answers at their end"),
}


def is_trl(values: Any) -> bool:
    """Tell whether a mapping is a config of TRL's."""
    return (
        isinstance(values, dict)
        and "model_name_or_path" in values
        and bool({"dataset_name", "datasets", "use_peft"} & values.keys())
        and not {"model", "data", "dataset", "stage", "finetuning_type", "template"} & values.keys()
    )


def read_trl(given: dict[str, Any], folder: Path, num_processes: int) -> Work:
    """Turn a config's keys into sections of a RunConfig.

    Args:
        given: the keys, None left out.
        folder: of the YAML file.
        num_processes: devices that train.
    """
    tables = ({**IMPLIED, **_IMPLIED}, NOT_DONE, {**REFUSED, **_REFUSED})
    work = Work({key: value for key, value in given.items() if key not in _SCRIPT}, tables=tables)
    for key in _SCRIPT & given.keys():
        work.say(key, given[key], "implied", "TRL's script alone looks at it")
    read_name(work)
    put_all(work, _SETTINGS)
    read_steps(work)
    _read_data(work)
    _read_method(work)
    read_batch(work, num_processes)
    read_optimizer(work)
    read_schedule(work)
    read_evaluations(work)
    read_kept(work)
    _read_memory(work)
    read_strategy(work, folder)
    read_reports(work)
    return work


_SCRIPT = {"config", "push_to_hub_token", "project", "trackio_space_id", "env"}


def _read_data(work: Work) -> None:
    """Name the dataset and its splits, and the template."""
    shown, name = work.take("dataset_name", "", str)
    shown_list, several = work.take("datasets", ())
    if name and not several:
        work.put("dataset_name", shown, "data.source", name)
    elif isinstance(several, list) and several and all(isinstance(each, dict) and "path" in each for each in several):
        _put_mixture(work, shown_list, several)
    else:
        work.say("dataset_name", shown, "refused", "name a dataset")
    shown, split = work.take("dataset_train_split", "train", str)
    work.put("dataset_train_split", shown, "data.split", split)
    shown, split = work.take("dataset_test_split", "test", str)
    strategy = work.given.get("eval_strategy", "no")
    if strategy != "no" and name:
        work.put("dataset_test_split", shown, "data.eval_source", name, f"its split {split}")
        work.put("dataset_test_split", shown, "data.eval_split", split)
    elif shown != NOT_GIVEN:
        why = "a part of the training split is held out (data.eval_fraction); eval_strategy: steps takes this split"
        work.say("dataset_test_split", shown, "implied", why)
    shown, template = work.take("chat_template_path", "", str)
    if template:
        work.put("chat_template_path", shown, "model.chat_template", template)
    shown, packs = work.take("packing", False, to_flag)
    if shown != NOT_GIVEN:
        work.put(
            "packing", shown, "training.packing", packs, "examples of a pack never see each other" if packs else ""
        )
    shown, revision = work.take("model_revision", "main", str)
    if revision != "main":
        work.put("model_revision", shown, "model.revision", revision)


def _put_mixture(work: Work, shown: Any, several: list[dict[str, Any]]) -> None:
    names = {"path": "source", "name": "subset", "split": "split"}
    for each in several:
        for key in each.keys() - names.keys() - {"columns", "data_dir", "data_files"}:
            work.say(f"datasets: {key}", each[key], "refused", f"there are {', '.join(names)}")
        for key in {"data_dir", "data_files"} & each.keys():
            work.say(f"datasets: {key}", each[key], "refused", "name the files as path")
    parts = [{ours: each[key] for key, ours in names.items() if each.get(key) is not None} for each in several]
    first = parts[0]
    work.put("datasets", shown, "data.source", first["source"])
    for key in ("subset", "split"):
        if key in first:
            work.put("datasets", shown, f"data.{key}", first[key])
    if parts[1:]:
        work.put("datasets", shown, "data.mixture", parts[1:], "each by itself")


def _read_method(work: Work) -> None:
    """Without use_peft every weight is trained."""
    shown, uses_peft = work.take("use_peft", False, to_flag)
    if not uses_peft:
        work.put("use_peft", shown, "training.method", "full", "without PEFT all weights are trained")
        for key in (*_LORA, "lora_target_modules"):
            given, _ = work.take(key, None)
            if given != NOT_GIVEN:
                work.say(key, given, "implied", "of no effect without use_peft")
        return
    work.put("use_peft", shown, "training.method", "lora")
    put_all(work, _LORA)
    shown, names = work.take("lora_target_modules", (), to_names)
    if names and names not in (("all-linear",), ("all",)):
        work.put("lora_target_modules", shown, "training.target_modules", names)
    elif shown != NOT_GIVEN:
        work.put("lora_target_modules", shown, "training.target_modules", ("all-linear",))
    else:
        why = "PEFT's choice for each family, mostly a part of attention: all linear layers are adapted, or name them"
        work.say("lora_target_modules", shown, "not done", why)


def _read_memory(work: Work) -> None:
    shown, in_4_bits = work.take("load_in_4bit", False, to_flag)
    if in_4_bits:
        work.put("load_in_4bit", shown, "training.base_weights", "nf4")
    elif shown != NOT_GIVEN:
        work.say("load_in_4bit", shown, "implied", "training.base_weights = full")
    shown, recomputes = work.take("gradient_checkpointing", True, to_flag)
    if not recomputes:
        work.put("gradient_checkpointing", shown, "training.gradient_checkpointing", False)
    elif shown != NOT_GIVEN:
        work.say("gradient_checkpointing", shown, "implied", "activations are recomputed where the memory asks for it")
