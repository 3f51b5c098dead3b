"""A merge by itself: an adapter into its base model, written to a folder and proven against base + adapter."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from schemas.artifacts import MergeCheck
from schemas.config import MergeConfig, ModelConfig
from tasks.base_model import locate_base_model
from tasks.merging.changes import MergeError
from tasks.merging.parity import ParityError, check_merge
from tasks.merging.weights import merge_adapter
from tasks.tokenization.encoding import encode
from tasks.tokenization.saving import save_tokenizer
from tasks.tokenization.templates import prepare_tokenizer

_QUESTIONS = ("Who are you?", "What is the capital of France?", "Write a line about the sea.", "1 + 2 =", "你好")


def export_merged(base_model: str, adapter: str, folder: Path, *, max_shard_size: str) -> MergeCheck:
    """Merge, reload from disk, and compare with base + adapter on a few prompts; without that proof no folder stays.

    Args:
        base_model: folder, or name on the hub.
        adapter: folder in PEFT's format; its tokenizer ships where it has one, else the base model's.
        folder: gets the model; new or empty.
        max_shard_size: of a safetensors file, such as 5GB.

    Raises:
        ValueError: one of them cannot be used, or the merged model is not base + adapter.
    """
    base = Path(locate_base_model(ModelConfig(base_model=base_model)).uri)
    trained = Path(adapter).expanduser()
    if not (trained / "adapter_config.json").is_file():
        raise MergeError(f"{adapter}: no adapter_config.json there: the folder of a LoRA adapter is wanted")
    folder = folder.expanduser()
    prepared = prepare_tokenizer(find_tokenizer(trained, base), None)
    with TemporaryDirectory() as shipped:
        save_tokenizer(prepared, Path(shipped))
        card = {"base_model": base_model}
        merge_adapter(base, trained, Path(shipped), folder, max_shard_size=max_shard_size, card=card)
    try:
        prompts = [encode(prepared.tokenizer, question) for question in _QUESTIONS]
        return check_merge(base, trained, folder, prompts, MergeConfig(max_shard_size=max_shard_size))
    except ParityError:
        shutil.rmtree(folder)
        raise


def find_tokenizer(adapter: Path, base: Path) -> Path:
    """Return the folder whose tokenizer goes with an adapter: its own, or the base model's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else base
