"""What lies beside trained weights, so that the folder can be used by itself: the tokenizer, and a card."""

import json
import shutil
from pathlib import Path

from schemas.artifacts import ModelRef
from schemas.config import TrainingConfig

_LOADS = {
    "lora": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)",
    "full": "sft merge FOLDER MODEL",
    "freeze": "sft merge FOLDER MODEL",
}


def complete_folder(folder: Path, tokenizer: Path, base_model: ModelRef, config: TrainingConfig) -> None:
    """Put the tokenizer that ships and a card beside an adapter or trained weights.

    Args:
        folder: of them.
        tokenizer: folder with template, pad and end of turn.
        base_model: what was trained.
        config: how.
    """
    for path in sorted(tokenizer.iterdir()):
        if path.is_file() and path.name not in ("config.json", "README.md"):
            shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(_write_card(base_model, config), encoding="utf-8")


def _write_card(base_model: ModelRef, config: TrainingConfig) -> str:
    """Return the card; nothing in it differs between two trainings of the same."""
    settings = {
        "base model": base_model.name,
        "base model revision": base_model.revision or "",
        "base model digest": base_model.digest,
        "method": config.method,
        **({"rank": str(config.rank), "alpha": f"{config.alpha:g}"} if config.is_lora else {}),
        "learning rate": f"{config.learning_rate:g}",
        "epochs": f"{config.num_epochs:g}",
    }
    kind = "LoRA adapter" if config.is_lora else "Trained weights"
    front = [f"library_name: {'peft' if config.is_lora else 'transformers'}", "pipeline_tag: text-generation"]
    front += [f"base_model: {json.dumps(base_model.name)}", f"tags: [{config.method}, sft-pipeline]"]
    lines = ["---", *front, "---", "", f"# {kind}", ""]
    lines += [
        f"Trained on conversations. The tokenizer with its chat template lies here too. `{_LOADS[config.method]}`"
    ]
    lines += ["loads it; `sft chat FOLDER` talks to it.", "", "| origin | |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in settings.items() if value]
    return "\n".join(lines) + "\n"
