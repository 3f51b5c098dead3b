"""The base model's folder: brought from disk or hub, safetensors only, digested."""

import json
from pathlib import Path

from schemas.artifacts import ModelRef
from schemas.config import ModelConfig, TokenizationConfig
from tasks.allowed_roots import check_allowed
from tasks.families.files import PROCESSOR_FILES
from tasks.families.weights import WeightsError, check_weights
from tasks.storage import digest_folder

_TOKENIZER_FILES = [
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "chat_template*",
]
MODEL_FILES = [
    *_TOKENIZER_FILES,
    *PROCESSOR_FILES,
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
]
OTHER_COPIES = ("consolidated*", "*/*.safetensors")
"""Of the weights, in their makers' own forms, beside those of transformers: patterns of the hub."""
_SETTING = "model.base_model"


class BaseModelError(ValueError):
    """The base model cannot be used."""


def locate_base_model(config: ModelConfig) -> ModelRef:
    """Return a reference to the base model's folder, downloading it when it is a hub name.

    Raises:
        BaseModelError: no such folder or hub model, no config.json, or weights that are not safetensors.
    """
    folder = _expand(config.base_model)
    if folder.is_dir():
        _check_folder(folder)
        try:
            digest = digest_folder(folder)
        except PermissionError as error:
            raise BaseModelError(f"{error.filename}: you may not read it: change its mode or owner") from None
        return ModelRef(uri=str(folder.absolute()), digest=digest, name=folder.absolute().name)
    folder = _download(config, MODEL_FILES)
    _check_folder(folder)
    # A snapshot folder is named after the commit that it holds.
    return ModelRef(uri=str(folder), digest=digest_folder(folder), name=config.base_model, revision=folder.name)


def locate_tokenizer(config: ModelConfig) -> Path:
    """Return a folder with the base model's tokenizer; its weights are neither needed nor fetched.

    Raises:
        BaseModelError: no such folder or hub model.
    """
    folder = _expand(config.base_model)
    return folder if folder.is_dir() else _download(config, _TOKENIZER_FILES)


def limit_length(config: TokenizationConfig, folder: Path, name: str) -> tuple[TokenizationConfig, str]:
    """Return the config with a length that the model has positions for, and a sentence where that is shorter.

    Args:
        config: with the wanted max_length.
        folder: of the model or its tokenizer; without a config.json nothing is known.
        name: of the model, for the sentence.
    """
    from tasks.models import read_context_length  # transformers, which a process that only fetches does not need

    context = read_context_length(folder) if (folder / "config.json").is_file() else None
    if context is None or context >= config.max_length:
        return config, ""
    told = (
        f"{name} has positions for {context:,} tokens: longer examples are cut there, not at tokenization.max_length "
        f"= {config.max_length:,}"
    )
    return config.model_copy(update={"max_length": context}), told


def _expand(name: str) -> Path:
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise BaseModelError(f"model.base_model = {name!r}: {error}: write the whole path") from None
    if _looks_like_path(name):
        check_allowed(path, _SETTING)  # first, so that nobody learns what is there
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        pass  # a hub name, or said below
    except OSError as error:
        raise BaseModelError(
            f"model.base_model = {name[:200]!r}: {error.strerror}: give a folder you may read"
        ) from None
    if _is_path(name):
        for each in (path, *path.rglob("*")):  # what is in it may be links
            check_allowed(each, _SETTING)
    return path


def _is_path(name: str) -> bool:
    return _looks_like_path(name) or Path(name).exists()


def _looks_like_path(name: str) -> bool:
    """Hub names are `name` or `owner/name`; everything else is meant as a path."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file() and not (folder / "adapter_config.json").is_file():
        raise BaseModelError(f"{folder}: config.json is missing: a transformers model folder is wanted")
    try:
        values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise BaseModelError(f"{config}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise BaseModelError(f"{config}: an object of settings is wanted, got {str(values)[:80]!r}")
    if "auto_map" in values and not values.get("model_type"):
        raise BaseModelError(f"{config}: the model needs code of its own, which is never run here")
    try:
        check_weights(folder)
    except WeightsError as error:
        raise BaseModelError(str(error)) from None


def _download(config: ModelConfig, patterns: list[str]) -> Path:
    """Fetch a hub model's files into the hub's own cache."""
    if _is_path(config.base_model):
        raise BaseModelError(
            f"model.base_model = {config.base_model!r}: no such folder (looked in {Path.cwd()}): "
            "give a folder with config.json and safetensors weights, or the name of a model on the hub"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        place = snapshot_download(
            config.base_model, revision=config.revision, allow_patterns=patterns, ignore_patterns=list(OTHER_COPIES)
        )
        return Path(place)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BaseModelError(
            f"model.base_model = {config.base_model!r}: no such folder in {Path.cwd()}, and the hub did not give it "
            f"({reason.removeprefix('Got: ')}): correct the name or model.revision, set HF_TOKEN where it is private, "
            "or give the folder of a model; a model that was fetched before needs no network"
        ) from error
