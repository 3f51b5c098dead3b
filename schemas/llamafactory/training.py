"""LLaMA-Factory's config of a training as sections of ours."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from schemas.llamafactory.lines import NOT_GIVEN, Work, find_default, to_flag, to_names, to_number, to_whole
from schemas.llamafactory.preferences import read_objective
from schemas.llamafactory.settings import LORA, SETTINGS, TEMPLATES, Setting

INDEX = "dataset_info.json"
FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")
_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}


def read_training(work: Work, folder: Path, num_processes: int) -> None:
    """Turn all keys that are settings here into sections of a RunConfig.

    Args:
        work: the keys.
        folder: of the YAML file.
        num_processes: devices that train.
    """
    read_name(work)
    read_objective(work)
    _read_settings(work)
    _read_datasets(work, folder)
    _read_held_out(work)
    _read_labels(work)
    _read_method(work)
    read_batch(work, num_processes)
    _read_packing(work)
    read_optimizer(work)
    read_schedule(work)
    read_evaluations(work)
    read_kept(work)
    _read_memory(work)
    read_strategy(work, folder)
    read_reports(work)


def read_name(work: Work) -> None:
    """Name the run and the registered model by run_name, or by the output folder."""
    (output, _), (name, _) = work.take("output_dir", ""), work.take("run_name", "")
    key, shown = ("output_dir", output) if name == NOT_GIVEN else ("run_name", name)
    text = name_by_folder(str(shown))
    place = "weights and reports are in the registry and in MLflow"
    if shown != NOT_GIVEN and text:
        work.put(key, shown, "name", text)
        work.put(key, shown, "registry.name", text, place)
    if output not in (NOT_GIVEN, shown):
        work.say("output_dir", output, "implied", place)


def name_by_folder(folder: str) -> str:
    """Return the name of a registered model for an output folder; nothing where no letter of it can be in a name."""
    parts = [part for part in Path(folder).parts if part not in ("saves", "output", "outputs", "/", "..")]
    text = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in "-".join(parts))
    return text.encode("ascii", "ignore").decode().strip("-._")


def _read_settings(work: Work) -> None:
    put_all(work, SETTINGS)
    read_steps(work)
    shown, revision = work.take("model_revision", "main", str)
    if revision != "main":
        work.put("model_revision", shown, "model.revision", revision)
    elif shown != NOT_GIVEN:
        work.say("model_revision", shown, "implied", "it is the default of the hub")


def read_steps(work: Work) -> None:
    """Read max_steps, which goes before the epochs."""
    shown, max_steps = work.take("max_steps", -1, to_whole)
    if max_steps > 0:
        work.put("max_steps", shown, "training.max_steps", max_steps)
    elif shown != NOT_GIVEN:
        work.say("max_steps", shown, "implied", "the epochs decide")


def _read_datasets(work: Work, folder: Path) -> None:
    """Name the datasets as entries of the index, or as datasets of the hub."""
    shown, names = work.take("dataset", (), to_names)
    shown_held_out, held_out = work.take("eval_dataset", (), to_names)
    shown_index, index = work.take("dataset_dir", "data")
    if not names:
        work.say("dataset", NOT_GIVEN, "refused", f"name entries of a {INDEX}")
        return
    if not isinstance(index, str) or index.startswith("REMOTE:"):
        work.say("dataset_dir", shown_index, "refused", f"give a folder with a {INDEX}, or ONLINE")
        return
    if index == "ONLINE":
        sources, given, eval_source = list(names), {"format": "alpaca"}, ",".join(held_out)
    else:
        path = find_path(Path(index) / INDEX, folder)
        if not is_there(path, as_file=True):
            text = f"{path}: no such file, neither from the working folder nor from the config's or one above it"
            work.say("dataset_dir", shown_index, "refused", text)
            return
        # With max_samples each dataset gives as many rows, so that each has to stand by itself.
        together = work.find("data.max_rows") is None
        sources = [f"{path}#{','.join(names)}"] if together else [f"{path}#{name}" for name in names]
        given, eval_source = {}, f"{path}#{','.join(held_out)}"
    work.put("dataset", shown, "data.source", sources[0])
    if given:
        work.put("dataset_dir", shown_index, "data.format", given["format"])
    elif shown_index != NOT_GIVEN:
        work.say("dataset_dir", shown_index, "becomes", "the folder of data.source")
    if len(sources) > 1:
        mixture = [{"source": source, **given} for source in sources[1:]]
        work.put("dataset", shown, "data.mixture", mixture, "each by itself")
    if held_out:
        work.put("eval_dataset", shown_held_out, "data.eval_source", eval_source)


def find_path(path: Path, folder: Path) -> Path:
    """Return a path as it is found from the working folder, or else from the YAML's folder or one above it."""
    with suppress(RuntimeError):  # a user that there is not
        path = path.expanduser()
    if path.is_absolute() or is_there(path):
        return path
    absolute = folder.resolve()
    return next((parent / path for parent in (absolute, *absolute.parents) if is_there(parent / path)), path)


def is_there(path: Path, *, as_file: bool = False) -> bool:
    """Tell whether there is something at a path, or a file; nothing can be where a name is too long."""
    try:
        return path.is_file() if as_file else path.exists()
    except OSError:
        return False


def _read_held_out(work: Work) -> None:
    """Hold out what val_size says; where it says nothing a part, since without held-out rows nothing can be judged."""
    shown, size = work.take("val_size", 0.0, to_number)
    if work.find("data.eval_source") is not None:
        if size:
            work.say("val_size", shown, "refused", "it excludes eval_dataset")
    elif size > 1:
        work.put("val_size", shown, "data.max_eval_rows", int(size))
        work.put("val_size", shown, "data.eval_fraction", 0.999, "that many rows, at most all but one")
    elif 0 < size < 1:
        work.put("val_size", shown, "data.eval_fraction", size, "at most data.max_eval_rows")
    elif shown != NOT_GIVEN:
        work.put("val_size", shown, "data.eval_fraction", 0.0, "nothing is compared, and the version stays challenger")
    else:
        part = f"data.eval_fraction = {find_default('data.eval_fraction')}"
        why = f"{part}: a part is held out, so that the result can be judged; val_size: 0 trains on all rows"
        work.say("val_size", shown, "implied", why)


def _read_labels(work: Work) -> None:
    """Say which tokens are trained, and how a conversation that is too long is cut."""
    shown, name = work.take("template", "", str)
    own = "the tokenizer's own chat template is used; where it has none"
    if TEMPLATES.get(name, "chatml") != "chatml":
        work.put("template", shown, "model.chat_template", f"default:{TEMPLATES[name]}", f"{own}, {TEMPLATES[name]}")
    elif shown != NOT_GIVEN:
        work.say("template", shown, "implied", f"{own} chatml, or plain (model.chat_template)")
    shown, thinks = work.take("enable_thinking", None, lambda value: None if value is None else to_flag(value))
    if thinks is not None:
        why = "where the chat template reads it; saved with the model"
        work.put("enable_thinking", shown, "tokenization.template_arguments", {"enable_thinking": thinks}, why)
    elif shown != NOT_GIVEN:
        work.say("enable_thinking", shown, "implied", "the chat template decides where thoughts stand")
    shown, is_last = work.take("mask_history", False, to_flag)
    if is_last and work.find("tokenization.train_on_prompt"):
        work.say("mask_history", shown, "refused", "it excludes train_on_prompt")
    elif shown != NOT_GIVEN:
        work.put("mask_history", shown, "tokenization.train_on", "last_turn" if is_last else "all_turns")
    why = "answers beyond cutoff_len are cut; prompts are cut inside their contents, never in a header"
    work.put("cutoff_len", NOT_GIVEN, "tokenization.truncation", "cut_answer", why)


def put_all(work: Work, settings: Mapping[str, Setting]) -> None:
    """Take each key of a table that is a setting of ours under another name."""
    for key, setting in settings.items():
        shown, value = work.take(key, setting.default, setting.convert)
        if value is not None:
            work.put(key, shown, setting.field, value)


def _read_method(work: Work) -> None:
    """Read what is trained: an adapter, all weights, or the last or first layers."""
    shown, method = work.take("finetuning_type", "lora", str)
    if method not in ("lora", "full", "freeze"):
        work.say("finetuning_type", shown, "refused", "there are lora, full and freeze")
        return
    if shown != NOT_GIVEN:
        work.put("finetuning_type", shown, "training.method", method)
    if method == "freeze":
        _read_freeze(work)
    if method == "lora":
        _read_lora(work)
    others = [*FREEZE] if method == "lora" else [*LORA, "lora_alpha", "lora_target"]
    for key in others if method != "full" else [*others, *FREEZE]:
        shown, _ = work.take(key, None)
        if shown != NOT_GIVEN:
            work.say(key, shown, "implied", f"of no effect with finetuning_type {method}")


def _read_freeze(work: Work) -> None:
    """Read which layers and modules are trained; a negative number means the first ones."""
    layers, modules, extra = FREEZE
    shown, names = work.take(modules, ("all",), to_names)
    if names != ("all",):
        text = "all modules of the chosen layers are trained here: name modules in training.trained_modules"
        work.say(modules, shown, "refused", text)
    elif shown != NOT_GIVEN:
        work.say(modules, shown, "implied", "all modules of the chosen layers are trained")
    shown, number = work.take(layers, 2, to_whole)
    first = tuple(f"layers.{layer}" for layer in range(-number))
    work.put(layers, shown, "training.trained_layers", max(0, number), "the first ones are named" if first else "")
    shown_extra, further = work.take(extra, (), to_names)
    if first or further:
        key, given = (extra, shown_extra) if further else (layers, shown)
        work.put(key, given, "training.trained_modules", (*first, *further))


def _read_lora(work: Work) -> None:
    put_all(work, LORA)
    shown, alpha = work.take("lora_alpha", 2.0 * work.find("training.rank"), to_number)
    work.put("lora_alpha", shown, "training.alpha", alpha, "twice the rank" if shown == NOT_GIVEN else "")
    shown, names = work.take("lora_target", ("all",), to_names)
    if names != ("all",):
        work.put("lora_target", shown, "training.target_modules", names)
    elif shown != NOT_GIVEN:
        work.put("lora_target", shown, "training.target_modules", ("all-linear",))


def read_batch(work: Work, num_processes: int) -> None:
    """Take batch sizes as they are meant: of each device."""
    key = "per_device_train_batch_size"
    shown, size = work.take(key, 8, to_whole)
    work.put(key, shown, "training.micro_batch", size)
    if num_processes > 1:
        work.put(key, shown, "training.num_processes", num_processes)
    shown, steps = work.take("gradient_accumulation_steps", 1, to_whole)
    why = f"{steps} on each of {num_processes} devices" if num_processes > 1 else ""
    name = "training.gradient_accumulation_steps"
    work.put("gradient_accumulation_steps", shown, name, steps * num_processes, why)


def _read_packing(work: Work) -> None:
    (shown_packing, packing), (shown_neat, neat) = (
        work.take(key, False, to_flag) for key in ("packing", "neat_packing")
    )
    for key, shown in (("packing", shown_packing), ("neat_packing", shown_neat)):
        if shown != NOT_GIVEN:
            why = "examples of a pack never see each other" if packing or neat else ""
            work.put(key, shown, "training.packing", packing or neat, why)


def read_optimizer(work: Work, key: str = "optim") -> None:
    """Read which AdamW it is; any other optimizer is refused."""
    shown, kind = work.take(key, "adamw_torch", str)
    if kind in ("adamw_8bit", "adamw_bnb_8bit", "adamw_torch_8bit", "paged_adamw_8bit"):
        work.put(key, shown, "training.optimizer", "adamw_8bit", "by torchao: pip install 'sft-pipeline[torchao]'")
    elif kind not in ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused"):
        work.say(key, shown, "refused", "AdamW is the optimizer here, or adamw_8bit")
    elif shown != NOT_GIVEN:
        work.say(key, shown, "implied", "training.optimizer = adamw")


def read_schedule(work: Work) -> None:
    """Read schedule and warm-up."""
    shown, kind = work.take("lr_scheduler_type", "linear", str)
    if kind in _SCHEDULERS:
        work.put("lr_scheduler_type", shown, "training.scheduler", _SCHEDULERS[kind])
    else:
        work.say("lr_scheduler_type", shown, "refused", f"there are {', '.join(_SCHEDULERS)}")
    shown_ratio, ratio = work.take("warmup_ratio", 0.0, to_number)
    shown_steps, steps = work.take("warmup_steps", 0.0, to_number)
    max_steps = work.find("training.max_steps")
    if steps >= 1 and max_steps is None:
        text = "a number of steps is known with max_steps only: write warmup_ratio, the part of all steps"
        work.say("warmup_steps", shown_steps, "refused", text)
        return
    key, shown, part = "warmup_ratio", shown_ratio, ratio
    if steps > 0:  # it goes before the ratio
        key, shown, part = "warmup_steps", shown_steps, steps / max_steps if steps >= 1 else steps
    for other, value in (("warmup_ratio", shown_ratio), ("warmup_steps", shown_steps)):
        if other != key and value != NOT_GIVEN:
            work.say(other, value, "implied", f"{key} decides")
    if kind == "constant" and part:
        work.put(key, shown, "training.warmup_fraction", 0.0, "as in LLaMA-Factory; constant_with_warmup has a warm-up")
        return
    work.put(key, shown, "training.warmup_fraction", part)


def read_evaluations(work: Work) -> None:
    """Read how often the evaluation loss is measured."""
    key = "evaluation_strategy" if "evaluation_strategy" in work.given else "eval_strategy"
    (shown, strategy), (shown_steps, steps) = work.take(key, "no", str), work.take("eval_steps", None, to_whole)
    text = "the evaluation loss is measured ten times a run"
    if strategy == "steps" and steps is not None:
        work.put("eval_steps", shown_steps, "training.eval_every_steps", steps)
        text = "the evaluation loss is measured between steps"
    elif steps is not None:
        work.say("eval_steps", shown_steps, "implied", text)
    if shown != NOT_GIVEN:
        work.say(key, shown, "implied", text)


def read_kept(work: Work) -> None:
    """Keep the last adapter, unless the best one is asked for."""
    shown, is_best = work.take("load_best_model_at_end", False, to_flag)
    if is_best or shown != NOT_GIVEN or work.find("training.early_stopping_patience") is not None:
        work.put("load_best_model_at_end", shown, "training.keep", "best" if is_best else "last")


def _read_memory(work: Work) -> None:
    shown, bits = work.take("quantization_bit", None, to_whole)
    if bits == 4:
        work.put("quantization_bit", shown, "training.base_weights", "nf4")
    elif bits is not None:
        work.say(
            "quantization_bit", shown, "refused", "4 bits (NF4) are what there is; training.base_weights knows fp8"
        )
    key = "disable_gradient_checkpointing"
    shown, is_off = work.take(key, False, to_flag)
    if is_off:
        work.put(key, shown, "training.gradient_checkpointing", False)
    elif shown != NOT_GIVEN:
        work.say(key, shown, "implied", "activations are recomputed where the memory asks for it")


def read_strategy(work: Work, folder: Path) -> None:
    """Read the stage of a DeepSpeed config, or fsdp."""
    shown, fsdp = work.take("fsdp", "")
    if fsdp:
        work.put("fsdp", shown, "training.strategy", "fsdp")
    shown, settings = work.take("deepspeed", None)
    if settings is None:
        return
    if isinstance(settings, str):
        try:
            settings = yaml.safe_load(find_path(Path(settings), folder).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            text = f"the file cannot be read ({type(error).__name__}): correct its path"
            work.say("deepspeed", shown, "refused", text)
            return
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage", 0)
    if stage in (1, 2, 3):
        work.put("deepspeed", shown, "training.strategy", f"zero{max(2, stage)}", f"its stage is {stage}")
    else:
        work.say("deepspeed", shown, "implied", "stage 0 divides nothing: training.strategy = ddp")
    for key in ("offload_optimizer", "offload_param"):
        device = zero.get(key, {}).get("device", "none") if isinstance(zero.get(key), dict) else "none"
        if device != "none":
            work.say(f"deepspeed: {key}", device, "not done", "nothing is moved to the host's memory")


def read_reports(work: Work) -> None:
    """Read where the curves go."""
    shown, names = work.take("report_to", (), to_names)
    if {"tensorboard", "all"} & set(names):
        work.put("report_to", shown, "training.report_to", ("tensorboard",), "besides MLflow")
    elif set(names) <= {"mlflow", "none"} and shown != NOT_GIVEN:
        work.say("report_to", shown, "implied", "the curves are in MLflow in any case")
    for name in sorted(set(names) - {"tensorboard", "all", "mlflow", "none"}):
        work.say("report_to", name, "not done", "the curves go to MLflow and TensorBoard")
