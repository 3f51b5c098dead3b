"""Axolotl's YAML of a supervised fine-tuning in our terms.

Keys that are not given have Axolotl's defaults, not ours. Keys that mean the same as transformers' are read under
those names; a line shows the name in the file.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas.llamafactory.keys import IMPLIED, NOT_DONE, REFUSED
from schemas.llamafactory.lines import NOT_GIVEN, Outcome, Work, to_flag, to_names, to_number, to_whole
from schemas.llamafactory.settings import TEMPLATES, Setting
from schemas.llamafactory.training import (
    put_all,
    read_batch,
    read_evaluations,
    read_name,
    read_optimizer,
    read_schedule,
    read_steps,
    read_strategy,
)

_SETTINGS: dict[str, Setting] = {
    "base_model": Setting("model.base_model", str),
    "revision_of_model": Setting("model.revision", str),
    "seed": Setting("seed", to_whole, 42),
    "sequence_len": Setting("tokenization.max_length", to_whole, 512),
    "train_on_inputs": Setting("tokenization.train_on_prompt", to_flag, False),
    "sample_packing": Setting("training.packing", to_flag, False),
    "learning_rate": Setting("training.learning_rate", to_number, 5e-5),
    "weight_decay": Setting("training.weight_decay", to_number, 0.0),
    "max_grad_norm": Setting("training.max_grad_norm", to_number, 1.0),
    "num_epochs": Setting("training.num_epochs", to_number, 1.0),
    "save_total_limit": Setting("training.keep_checkpoints", to_whole),
    "early_stopping_patience": Setting("training.early_stopping_patience", to_whole),
}
_LORA: dict[str, Setting] = {
    "lora_r": Setting("training.rank", to_whole, 8),
    "lora_alpha": Setting("training.alpha", to_number, 16.0),
    "lora_dropout": Setting("training.dropout", to_number, 0.0),
    "lora_modules_to_save": Setting("training.modules_to_save", to_names),
    "peft_use_rslora": Setting("training.use_rslora", to_flag, False),
    "peft_use_dora": Setting("training.use_dora", to_flag, False),
}
# Of transformers, under Axolotl's name.
_RENAMED = {
    "micro_batch_size": "per_device_train_batch_size",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "val_set_size": "val_size",
}
_IMPLIED = {
    **dict.fromkeys(
        (
            "base_model_config",
            "tokenizer_config",
            "model_type",
            "tokenizer_type",
            "tokenizer_use_fast",
            "is_llama_derived_model",
        ),
        "found by the model's own config.json",
    ),
    **dict.fromkeys(
        ("eval_sample_packing", "pad_to_sequence_len", "sample_packing_eff_est", "sample_packing_group_size"),
        "padding costs nothing here",
    ),
    **dict.fromkeys(
        ("dataset_prepared_path", "dataset_processes", "shuffle_merged_datasets", "dataset_keep_in_memory", "strict"),
        "the cache knows when data, settings or code changed",
    ),
    **dict.fromkeys(
        (
            "flash_attention",
            "xformers_attention",
            "sdp_attention",
            "flex_attention",
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "flash_attn_cross_entropy",
            "flash_attn_rms_norm",
            "flash_attn_fuse_mlp",
            "plugins",
            "liger_rope",
            "liger_rms_norm",
            "liger_glu_activation",
            "liger_fused_linear_cross_entropy",
            "cut_cross_entropy",
            "torch_compile",
            "float16",
            "bfloat16",
        ),
        "training.engine auto: the fused engine where it knows the model",
    ),
    **dict.fromkeys(
        (
            "saves_per_epoch",
            "evals_per_epoch",
            "eval_table_size",
            "eval_max_new_tokens",
            "eval_batch_size",
            "save_steps",
        ),
        "training.checkpoint_every_steps and eval_every_steps say when",
    ),
    **dict.fromkeys(("lora_fan_in_fan_out", "debug", "auto_resume_from_checkpoints"), "of no effect here"),
    **dict.fromkeys(("use_mlflow", "mlflow_tracking_uri", "mlflow_experiment_name"), "MLflow has every run"),
    "fsdp_version": "FSDP2 divides the model",
    "fsdp_config": "FSDP2 divides the model, layer by layer",
    "special_tokens": "the tokenizer's own are used, and a pad token is chosen where it has none",
    "gradient_checkpointing_kwargs": "activations are recomputed where the memory asks for it",
}
_NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_log_model", "use_wandb"),
        (("", False), "the curves go to MLflow and TensorBoard"),
    ),
    "load_in_8bit": ((False,), "the frozen weights lie in 16 bits: the same training in more memory"),
}
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(("rl", "trl", "reward_model"), ((), "supervised fine-tuning is done here, and nothing else")),
    **dict.fromkeys(("tokens", "added_tokens_overrides"), (([], {}), "no token is added to a vocabulary")),
    "lora_model_dir": ((), "a training begins with the base model: merge the adapter first, and train the result"),
    "unfrozen_parameters": (([],), "name modules in training.trained_modules, with training.method freeze"),
    "chat_template_jinja": ((), "write it into a .jinja file, and name that in model.chat_template"),
    "streaming": ((False,), "datasets are read whole, with little memory"),
    **dict.fromkeys(
        ("relora", "relora_steps", "lisa_n_layers", "loraplus_lr_ratio", "noisy_embedding_alpha"),
        ((False, 0), "there is no such method here"),
    ),
}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "chat_template": "auto"}
_FIELDS = {"path", "type", "name", "split", "data_files", "ds_type", "field_messages", "message_property_mappings",
           "message_field_role", "message_field_content", "roles", "roles_to_train", "train_on_eos", "conversation",
           "revision", "chat_template", "train_on_split"}  # fmt: skip


def is_axolotl(values: Any) -> bool:
    """Tell whether a mapping is a config of Axolotl's."""
    return (
        isinstance(values, dict)
        and isinstance(values.get("datasets"), list)
        and isinstance(values.get("base_model"), str)
    )


def read_axolotl(given: dict[str, Any], folder: Path, num_processes: int) -> Work:
    """Turn a config's keys into sections of a RunConfig.

    Args:
        given: the keys, None left out.
        folder: of the YAML file.
        num_processes: devices that train.
    """
    tables = ({**IMPLIED, **_IMPLIED}, {**NOT_DONE, **_NOT_DONE}, {**REFUSED, **_REFUSED})
    work = Work({_RENAMED.get(key, key): value for key, value in given.items()}, tables=tables)
    read_name(work)
    put_all(work, _SETTINGS)
    read_steps(work)
    _read_datasets(work)
    _read_held_out(work)
    _read_template(work)
    _read_method(work)
    read_batch(work, num_processes)
    read_optimizer(work)
    read_schedule(work)
    read_evaluations(work)
    _read_memory(work)
    _read_fsdp(work)
    read_strategy(work, folder)
    names = {theirs: own for own, theirs in _RENAMED.items() if own in given}
    work.lines = [replace(line, key=names.get(line.key, line.key)) for line in work.lines]
    return work


def _read_datasets(work: Work) -> None:
    shown, several = work.take("datasets", [])
    parts = [part for entry in several if (part := _read_dataset(work, entry)) is not None]
    if len(parts) != len(several) or not parts:
        return
    first = parts[0]
    for key, value in first.items():
        work.put("datasets", shown, f"data.{key}", value)
    if parts[1:]:
        work.put("datasets", shown, "data.mixture", parts[1:], "each by itself")


def _read_dataset(work: Work, entry: Any) -> dict[str, Any] | None:
    """Return how one dataset is read here; None where that cannot be."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        work.say("datasets", entry, "refused", "each is a mapping with a path")
        return None
    kind = entry.get("type", "chat_template")
    unknown = sorted(entry.keys() - _FIELDS)
    if unknown or kind not in _FORMATS:
        what = f"datasets: {unknown[0]}" if unknown else "datasets: type"
        text = f"there are {', '.join(_FORMATS)}; data.columns maps other columns"
        work.say(what, entry[unknown[0]] if unknown else kind, "refused", text)
        return None
    files = entry.get("data_files")
    if isinstance(files, list):
        if len(files) != 1:
            work.say("datasets: data_files", files, "refused", "name each file as a dataset of its own")
            return None
        files = files[0]
    part: dict[str, Any] = {"source": files or entry["path"]}
    part |= {
        ours: entry[key]
        for key, ours in (("name", "subset"), ("split", "split"), ("revision", "revision"))
        if entry.get(key)
    }
    if _FORMATS[kind] != "auto":
        part["format"] = _FORMATS[kind]
    for key in ("roles_to_train", "train_on_eos"):
        if key in entry:
            work.say(f"datasets: {key}", entry[key], "implied", "assistants are trained, with their end of turn")
    return part


def _read_held_out(work: Work) -> None:
    shown, size = work.take("val_size", 0.0, to_number)
    shown_tests, tests = work.take("test_datasets", [])
    if tests:
        part = _read_dataset(work, tests[0]) if len(tests) == 1 else None
        if part is None:
            work.say("test_datasets", shown_tests, "refused", "one held-out dataset is taken: data.eval_source")
            return
        work.put("test_datasets", shown_tests, "data.eval_source", part["source"])
        if "split" in part:
            work.put("test_datasets", shown_tests, "data.eval_split", part["split"])
    elif size > 1:
        work.put("val_set_size", shown, "data.max_eval_rows", int(size))
        work.put("val_set_size", shown, "data.eval_fraction", 0.999, "that many rows, at most all but one")
    elif size > 0:
        work.put("val_set_size", shown, "data.eval_fraction", size, "at most data.max_eval_rows")
    elif shown != NOT_GIVEN:
        work.put(
            "val_set_size", shown, "data.eval_fraction", 0.0, "nothing is compared, and the version stays challenger"
        )
    else:
        work.say("val_set_size", shown, "implied", "a part is held out, so that the result can be judged")


def _read_template(work: Work) -> None:
    shown, name = work.take("chat_template", "tokenizer_default", str)
    name = name.removeprefix("tokenizer_default_fallback_")
    if name in TEMPLATES:
        work.put(
            "chat_template", shown, "model.chat_template", f"default:{TEMPLATES[name]}", "where it has none of its own"
        )
    elif shown != NOT_GIVEN:
        work.say("chat_template", shown, "implied", "the tokenizer's own is used; where it has none chatml, or plain")


def _read_method(work: Work) -> None:
    shown, adapter = work.take("adapter", "", str)
    if adapter not in ("", "lora", "qlora"):
        work.say("adapter", shown, "refused", "there are lora, qlora, and none for all weights")
        return
    shown_4_bits, in_4_bits = work.take("load_in_4bit", adapter == "qlora", to_flag)
    if not adapter:
        if shown_4_bits != NOT_GIVEN:
            outcome: Outcome = "refused" if in_4_bits else "implied"
            work.say("load_in_4bit", shown_4_bits, outcome, "weights that are trained are never packed")
        work.put("adapter", shown, "training.method", "full", "without an adapter all weights are trained")
        for key in (*_LORA, "lora_target_modules", "lora_target_linear"):
            given, _ = work.take(key, None)
            if given != NOT_GIVEN:
                work.say(key, given, "implied", "of no effect without an adapter")
        return
    work.put("adapter", shown, "training.method", "lora")
    if in_4_bits:
        work.put("load_in_4bit", shown_4_bits, "training.base_weights", "nf4")
    elif shown_4_bits != NOT_GIVEN:
        work.say("load_in_4bit", shown_4_bits, "implied", "training.base_weights = full")
    put_all(work, _LORA)
    shown_linear, all_linear = work.take("lora_target_linear", False, to_flag)
    shown, names = work.take("lora_target_modules", (), to_names)
    if all_linear or names in (("all-linear",), ()):
        key, given = ("lora_target_linear", shown_linear) if all_linear else ("lora_target_modules", shown)
        work.put(key, given, "training.target_modules", ("all-linear",))
    else:
        work.put("lora_target_modules", shown, "training.target_modules", names)


def _read_memory(work: Work) -> None:
    shown, recomputes = work.take("gradient_checkpointing", False, lambda value: value)
    if shown != NOT_GIVEN:
        work.say(
            "gradient_checkpointing", recomputes, "implied", "activations are recomputed where the memory asks for it"
        )


def _read_fsdp(work: Work) -> None:
    shown, given = work.take("fsdp", [])
    if given:
        work.put("fsdp", shown, "training.strategy", "fsdp")
