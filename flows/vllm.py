"""vLLM's command for a version or a model folder: written, and checked against what the model needs."""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from flows.serving import name_target
from flows.targets import describe_version, fetch_version, is_trained_folder, is_version
from tasks import tracking
from tasks.evaluation.generation import find_stop_ids
from tasks.models import load_tokenizer
from tasks.prompts import load_settings
from tasks.registry.versions import RUN_TAG
from tasks.serving.call_syntax import learn_syntax
from tasks.serving.served_model import make_render
from tasks.serving.vllm_command import VllmNeeds, check_command, count_gpus, read_needs, write_command


class VllmError(ValueError):
    """vLLM cannot serve this as it is."""


@dataclass(frozen=True)
class VllmCommand:
    """A command, and what stands against it."""

    words: list[str]
    problems: list[str]
    copying: list[str]
    """The command that leaves a registered version in the folder that the other one names; none for a folder."""


def write_vllm(target: str, *, host: str, port: int, length: int | None, name: str) -> VllmCommand:
    """Return the command for a target, checked by the same rules as any other.

    Raises:
        ValueError: there is no such model, or it is an adapter.
    """
    needs = find_needs(target, name)
    num_gpus = count_gpus(needs, torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 1
    words = write_command(needs, host=host, port=port, length=length, num_gpus=num_gpus)
    copying = ["sft", "merge", needs.version, needs.copy] if needs.version else []
    return VllmCommand(words, check_command(words, needs), copying)


def check_vllm(target: str, file: Path, *, name: str) -> list[str]:
    """Return what the command in a file would do otherwise than the model was evaluated.

    Raises:
        ValueError: there is no such model or file, or it is no command of vLLM's.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise VllmError(f"{file}: cannot be read ({error})") from None
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    words = shlex.split(" ".join(line.removesuffix("\\") for line in lines))
    return check_command(words, find_needs(target, name))


def find_needs(target: str, name: str = "") -> VllmNeeds:
    """Return what a version or a model folder needs of vLLM.

    Raises:
        VllmError: it is an adapter.
    """
    if is_trained_folder(target):
        raise VllmError(f"{target}: vLLM is given a whole model: sft merge {target} FOLDER makes one")
    trained_length, known = None, {}
    if not target or is_version(target):
        version = describe_version(target)
        folder = fetch_version(version.name, version.version)
        trained_length = tracking.recorded_config(version.tags[RUN_TAG])["tokenization"].get("max_length")
        label = version.name
        known = {"version": f"{version.name}/{version.version}", "digest": version.digest}
    else:
        folder = Path(target).expanduser().resolve()
        label = name_target(target, folder.name)[0][0]
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        raise VllmError(f"{folder}: the tokenizer has no chat template: a model made by this pipeline has one")
    file = folder / "generation_config.json"
    shipped = GenerationConfig.from_pretrained(str(folder), local_files_only=True) if file.exists() else None
    return read_needs(
        folder,
        name or label,
        syntax=learn_syntax(make_render(tokenizer, load_settings(folder, tokenizer))),
        stop_ids=find_stop_ids((shipped,), tokenizer),
        template=str(tokenizer.chat_template),
        trained_length=trained_length,
        **known,
    )
