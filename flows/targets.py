"""What a command is pointed at: a registered version, or the folder of a model, an adapter or a checkpoint."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.exporting import TRAINED_FILES, find_tokenizer, name_base, opening_adapter
from schemas.artifacts import Ref
from schemas.config import ModelConfig
from tasks import tracking
from tasks.base_model import locate_base_model
from tasks.merging.weights import merge_adapter
from tasks.registry.bases import find_base_again
from tasks.registry.exports import FORM_TAG, PARENT_TAG
from tasks.registry.versions import (
    CHAMPION,
    MODEL_TAG,
    RUN_TAG,
    aliases_of,
    find_by_address,
    find_champions,
    get_version,
)
from tasks.tokenization.saving import save_tokenizer
from tasks.tokenization.templates import prepare_tokenizer
from tasks.training.checkpoints import TRAINED


class TargetError(ValueError):
    """There is no such model, or its base is not known."""


@dataclass(frozen=True)
class Target:
    """A model that lies in a folder for as long as it is open."""

    label: str
    folder: Path
    base: Path | None
    """Folder of what it was made from; None where nobody knows."""
    base_label: str = ""
    dataset: Ref | None = None
    """What a registered version was trained on; None of a folder."""


def is_trained_folder(target: str) -> bool:
    """Tell whether a folder holds an adapter, trained weights or a checkpoint, and no whole model."""
    return bool(target) and any((Path(target).expanduser() / name).is_file() for name in (*TRAINED_FILES, TRAINED))


@contextmanager
def opening_target(target: str, *, base_model: str = "", max_shard_size: str = "5GB") -> Iterator[Target]:
    """Give a whole model: an adapter or a checkpoint is merged into its base for as long.

    Args:
        target: folder of a model, an adapter, trained weights or a checkpoint; NAME, NAME/VERSION, NAME@alias; or empty
            for the only registered model that has a champion.
        base_model: folder or hub name, where the target names none or another one.
        max_shard_size: of the files of a model that is merged.

    Raises:
        ValueError: there is none, or it cannot be merged.
    """
    named = locate_base_model(ModelConfig(base_model=base_model)) if base_model else None
    if is_trained_folder(target):
        with opening_adapter(Path(target).expanduser()) as trained, TemporaryDirectory() as place:
            base = named or locate_base_model(ModelConfig(base_model=name_base(trained)))
            prepared = prepare_tokenizer(find_tokenizer(trained, Path(base.uri)), None)
            save_tokenizer(prepared, Path(place) / "tokenizer")
            tokenizer, merged = Path(place) / "tokenizer", Path(place) / "model"
            merge_adapter(Path(base.uri), trained, tokenizer, merged, max_shard_size=max_shard_size)
            yield Target(Path(target).expanduser().resolve().name, merged, Path(base.uri), base.name)
    elif target and Path(target).expanduser().is_dir():
        folder = Path(target).expanduser()
        yield Target(folder.resolve().name, folder, Path(named.uri) if named else None, named.name if named else "")
    else:
        name, version = find_version(target)
        folder = fetch_version(name, version)
        base_folder, label = (Path(named.uri), named.name) if named else find_base_of(name, version)
        recorded = get_version(name, version).tags.get("sft.dataset")
        dataset = Ref.model_validate_json(recorded) if recorded else None
        yield Target(f"{name} version {version}", folder, base_folder, label, dataset)


def find_version(target: str) -> tuple[str, str]:
    """Return name and version of a target that is no folder; the only champion where it is empty.

    Raises:
        TargetError: there is none.
    """
    address = target or only_champion()
    try:
        return find_by_address(address, default_alias=CHAMPION)
    except ValueError as error:
        if "@" in address:
            raise TargetError(str(error)) from None
        raise TargetError(f"{address}: there is no such folder in {Path.cwd()}, and {error}") from None


def is_version(target: str) -> bool:
    """Tell whether a target can only be a registered version."""
    return bool(target) and not Path(target).expanduser().exists() and not target.startswith((".", "/", "~"))


def copy_version(target: str, folder: Path) -> str:
    """Copy the model of a registered version into a new folder; return what it is.

    Raises:
        ValueError: there is no such version, or the folder is not empty.
    """
    name, version = find_version(target)
    found = fetch_version(name, version)
    if folder.exists() and any(folder.iterdir()):
        raise TargetError(f"{folder}: is not empty: give a new folder for the model")
    shutil.copytree(found, folder, dirs_exist_ok=True)
    return f"{name} version {version}"


def only_champion() -> str:
    """Return the name of the only registered model that has a champion.

    Raises:
        TargetError: there are none or several.
    """
    names = find_champions()
    if len(names) != 1:
        known = f"there are {', '.join(names)}" if names else "there is none: sft run makes one, and a folder does too"
        raise TargetError(
            f"name a model (NAME@alias, NAME/VERSION or a folder): of registered models with a champion {known}"
        )
    return names[0]


def fetch_version(name: str, version: str) -> Path:
    """Return the folder of a version's model.

    Raises:
        TargetError: it is none of this pipeline's.
    """
    found = get_version(name, version)
    digest = found.tags.get(MODEL_TAG)
    if digest is None:
        raise TargetError(
            f"{name} version {version} was not registered by this pipeline: download it and give its folder"
        )
    if found.tags.get(FORM_TAG, "").startswith("gguf"):
        raise TargetError(
            f"{name} version {version} is a GGUF file, for llama.cpp and Ollama: `sft export --output FOLDER` leaves "
            f"it in a folder; the model that it was made of is {found.tags[PARENT_TAG]}"
        )
    return tracking.resolve(Ref(uri=str(found.source), digest=digest))


def find_base_of(name: str, version: str) -> tuple[Path, str]:
    """Return folder and name of the base model of a version; it must be the very one.

    Raises:
        TargetError: another model lies there now.
    """
    tags = get_version(name, version).tags
    config = ModelConfig.model_validate(tracking.recorded_config(tags[RUN_TAG])["model"])
    ref = find_base_again(config, tags["sft.base_model_digest"])
    if ref.digest != tags["sft.base_model_digest"]:
        raise TargetError(
            f"{config.base_model} has digest {ref.digest[:12]} and {name} version {version} was made from "
            f"{tags['sft.base_model_digest'][:12]}: the base model has changed since"
        )
    return tracking.resolve(ref), ref.name


@dataclass(frozen=True)
class VersionFacts:
    """What is known of a registered version without its files."""

    name: str
    version: str
    aliases: tuple[str, ...]
    digest: str
    tags: dict[str, str]


def describe_version(target: str) -> VersionFacts:
    """Return what the registry knows of a version: NAME (its champion), NAME/VERSION, NAME@alias, or the only champion.

    Raises:
        ValueError: there is no such version, or it is none of this pipeline's.
    """
    name, version = find_by_address(target or only_champion(), default_alias=CHAMPION)
    tags = dict(get_version(name, version).tags)
    if MODEL_TAG not in tags:
        raise TargetError(f"{name} version {version} was not registered by this pipeline")
    return VersionFacts(name, version, aliases_of(name, version), tags[MODEL_TAG], tags)
