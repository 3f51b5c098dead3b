"""Writes the files beside the weights of a merged model: config, generation config, tokenizer, model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.families.files import PROCESSOR_FILES
from tasks.merging.changes import MergeError
from tasks.tokenization.templates import prepare_tokenizer

_HOW = {
    "lora": (
        "A LoRA adapter was trained on conversations and merged into the base model: W + s B A in fp32, cast once to",
        "the base's dtype.",
    ),
    "full": (
        "All weights of the text decoder were trained on conversations, in fp32, and cast once to the base's dtype.",
    ),
    "freeze": (
        "Some of the model's own weights were trained on conversations, in fp32, and cast once to the base's dtype;",
        "the others are the base's.",
    ),
}


def copy_companions(
    base_model: Path,
    tokenizer: Path,
    folder: Path,
    card: Mapping[str, str],
    *,
    unties: bool,
    unpacks: bool = False,
) -> None:
    """Write the small files that make the weights a model that can be served.

    Args:
        base_model: gives config.json and generation_config.json.
        tokenizer: copied whole.
        folder: of the merged model.
        card: what the model card tells.
        unties: the head has a tensor of its own now, so the config must not tie it.
        unpacks: weights that were packed are so no more, so the config must not say that they are.
    """
    for name in PROCESSOR_FILES:
        if (base_model / name).is_file():
            shutil.copyfile(base_model / name, folder / name)
    for path in sorted(tokenizer.iterdir()):
        if path.is_file() and path.name not in ("config.json", "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    config = _read_json(base_model / "config.json")
    config.pop("auto_map", None)  # names code beside the base model, which neither ran here nor comes along
    if unties:
        config = _untie(config)
    if unpacks:
        config.pop("quantization_config", None)
    _write_json(folder / "config.json", config)
    generation: dict[str, Any] = {}
    if (base_model / "generation_config.json").exists():
        generation = _read_json(base_model / "generation_config.json")
    _write_json(folder / "generation_config.json", _complete_generation(generation, config, tokenizer))
    (folder / "README.md").write_text(_write_card(card), encoding="utf-8")


def _complete_generation(generation: dict[str, Any], config: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """Add every trained end of turn to the base's eos ids, and the tokenizer's pad id."""
    prepared = prepare_tokenizer(tokenizer, None)
    pad = prepared.tokenizer.pad_token_id
    known = generation.get("eos_token_id", config.get("eos_token_id"))
    base_ends = [] if known is None else known if isinstance(known, list) else [known]
    shipped = tokenizer / "generation_config.json"
    trained_ends = _read_json(shipped).get("eos_token_id", []) if shipped.exists() else []
    trained_ends = trained_ends if isinstance(trained_ends, list) else [trained_ends]
    union = list(dict.fromkeys([*prepared.stop_token_ids, *trained_ends, *base_ends]))
    completed = {key: value for key, value in generation.items() if key != "_from_model_config"}
    if union:
        completed["eos_token_id"] = union[0] if len(union) == 1 else union
    if pad is not None:
        completed["pad_token_id"] = pad
    return completed


def _untie(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config with tie_word_embeddings off, also in a nested text config."""
    nested = config.get("text_config")
    inner = {"text_config": _untie(nested)} if isinstance(nested, dict) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _write_card(card: Mapping[str, str]) -> str:
    """Return the model card: front matter for the hub, and a table of where the model comes from."""
    base = card.get("base_model", "")
    method = card.get("method", "lora")
    tags = "lora, merged" if method == "lora" else method
    front = ["library_name: transformers", "pipeline_tag: text-generation", f"tags: [{tags}, sft-pipeline]"]
    front += [f"base_model: {json.dumps(base)}"] if base else []
    rows = [f"| {name.replace('_', ' ')} | `{value}` |" for name, value in card.items() if value]
    lines = [
        "---", *front, "---", "", "# Fine-tuned model", "",
        *_HOW[method], "The chat template lies with the tokenizer; the end of turn is among the eos ids.", "",
        "| origin | |", "|---|---|", *rows, "",
    ]  # fmt: skip
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MergeError(f"{path}: cannot be read ({error})") from error
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
