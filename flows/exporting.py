"""Model folders by hand: an adapter or a checkpoint merged into its base model, and a run's merged model copied."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from schemas.artifacts import MergeCheck, MergedRef
from schemas.config import MergeConfig, ModelConfig
from tasks import tracking
from tasks.base_model import locate_base_model
from tasks.families.files import TRAINED_CONFIG
from tasks.merging.changes import MergeError
from tasks.merging.parity import ParityError, check_merge
from tasks.merging.trained_models import read_trained_config
from tasks.merging.weights import merge_adapter
from tasks.models import load_model
from tasks.tokenization.encoding import encode
from tasks.tokenization.saving import save_tokenizer
from tasks.tokenization.templates import prepare_tokenizer

TRAINED_FILES = ("adapter_config.json", TRAINED_CONFIG)
"""One of them is in a folder that a training left."""
_QUESTIONS = ("Who are you?", "What is the capital of France?", "Write a line about the sea.", "1 + 2 =", "你好")


def export_merged(base_model: str, adapter: str, folder: Path, *, max_shard_size: str) -> MergeCheck:
    """Merge, reload from disk, and compare with base + adapter on a few prompts; without that proof no folder stays.

    Args:
        base_model: folder, or name on the hub; empty for the one that the adapter names.
        adapter: folder in PEFT's format or of trained weights, or a training's checkpoint; its tokenizer ships where
            it has one, else the base model's.
        folder: gets the model; new or empty.
        max_shard_size: of a safetensors file, such as 5GB.

    Raises:
        ValueError: one of them cannot be used, or the merged model is not base + adapter.
    """
    with opening_adapter(Path(adapter).expanduser()) as trained:
        named = base_model or name_base(trained)
        base = Path(locate_base_model(ModelConfig(base_model=named)).uri)
        prepared = prepare_tokenizer(find_tokenizer(trained, base), None)
        folder = folder.expanduser()
        with TemporaryDirectory() as shipped:
            save_tokenizer(prepared, Path(shipped))
            card = {"base_model": named}
            merge_adapter(base, trained, Path(shipped), folder, max_shard_size=max_shard_size, card=card)
        try:
            prompts = [encode(prepared.tokenizer, question) for question in _QUESTIONS]
            return check_merge(base, trained, folder, prompts, MergeConfig(max_shard_size=max_shard_size))
        except ParityError:
            shutil.rmtree(folder)
            raise


@contextmanager
def opening_adapter(folder: Path) -> Iterator[Path]:
    """Give a folder of an adapter or of trained weights: as it is, or made of a training's checkpoint for as long.

    Raises:
        MergeError: it is neither.
    """
    if any((folder / name).is_file() for name in TRAINED_FILES):
        yield folder
        return
    from tasks.training.checkpoints import TRAINED, read_trained
    from tasks.training.methods import attach_trained, save_trained
    from tasks.training.process.messages import read_job

    file = folder.parent.parent / "job.json"
    if not (folder / TRAINED).is_file() or not file.is_file():
        raise MergeError(
            f"{folder}: none of {', '.join(TRAINED_FILES)} there, nor a training's checkpoint: the folder of an "
            "adapter or of trained weights is wanted, or one of runs/…/train/checkpoints"
        )
    job = read_job(file)
    model = attach_trained(load_model(job.base_model), job.config, seed=job.seed)
    if job.config.is_lora:
        # As PEFT does it for a model that was loaded by its name.
        model.peft_config["default"].base_model_name_or_path = str(job.base_model)
    with TemporaryDirectory() as beside:
        adapter = save_trained(model, job.config, Path(beside) / "trained", read_trained(folder))
        del model
        for path in (job.tokens / "tokenizer").iterdir():
            shutil.copyfile(path, adapter / path.name)
        yield adapter


def name_base(adapter: Path) -> str:
    """Return the base model that an adapter names.

    Raises:
        MergeError: it names none.
    """
    named = read_trained_config(adapter).get("base_model_name_or_path")
    if not named:
        raise MergeError(f"{adapter}: it names no base model: name it there, or with --base-model")
    return str(named)


def find_tokenizer(adapter: Path, base: Path) -> Path:
    """Return the folder whose tokenizer goes with an adapter: its own, or the base model's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def copy_model(run_id: str, folder: Path) -> None:
    """Copy the merged model of a pipeline run into a folder."""
    merged = tracking.recall(run_id, "merge", MergedRef)
    assert merged is not None, run_id
    shutil.copytree(tracking.resolve(merged), folder, dirs_exist_ok=True)
