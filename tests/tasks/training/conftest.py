"""Tiny models with random weights, and tokens folders written by hand."""

import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from schemas.config import TrainingConfig
from tasks.training.rows import lay_out, open_rows
from tasks.training.token_table import TokenTable

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="the extra deepspeed is not installed")

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # the usual 0.02 leaves a model this small without an opinion
    "eos_token_id": 1,
}
KINDS = ("qwen3", "llama", "gemma3")


def build_model(folder: Path, kind: str = "qwen3", *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a model with random weights and return its folder."""
    torch.manual_seed(0)
    values = {**SHAPE, "tie_word_embeddings": True, **changes}
    model: Any
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**values))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**values))
    else:
        # Its logits are capped and its layers alternate between full and sliding attention.
        model = Gemma3ForCausalLM(Gemma3TextConfig(**values, sliding_window=8, final_logit_softcapping=5.0))
    model.to(dtype).save_pretrained(folder)
    return folder


def build_tokenizer(folder: Path) -> Path:
    """Put a tokenizer of single bytes with a chat template beside a model of 120 words; return the folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_letters = [letter for letter in letters if letter in {"Ġ", "Ċ"} or 32 < ord(letter) < 127]
    vocabulary = {letter: number + 2 for number, letter in enumerate(ascii_letters)} | {"<pad>": 0, "</s>": 1}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens(["<|turn|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}<|turn|>{{ message['role'] }}:{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def draw_examples(count: int, *, seed: int = 0, shortest: int = 4, longest: int = 24) -> list[tuple[list[int], int]]:
    """Draw examples of uneven lengths: ids, and how many of them are the prompt."""
    generator = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(generator.integers(shortest, longest + 1))
        ids = generator.integers(2, VOCABULARY, length).tolist()
        examples.append((ids, int(generator.integers(1, length - 1))))
    return examples


def write_split(path: Path, examples: Sequence[tuple[list[int], int]], *, prefix: str = "train") -> None:
    """Write train.parquet or eval.parquet as the tokenization does."""
    lists = pa.list_(pa.int32())
    table = {
        "example_id": [f"{prefix}-{number:04d}" for number in range(len(examples))],
        "question": ["?"] * len(examples),
        "reference": ["!"] * len(examples),
        "input_ids": pa.array([ids for ids, _ in examples], lists),
        "labels": pa.array([[-100] * start + ids[start:] for ids, start in examples], lists),
    }
    pq.write_table(pa.table(table), path)


def write_tokens(folder: Path, *, num_train: int = 40, num_eval: int = 8, **lengths: int) -> Path:
    """Write a tokens folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_split(folder / "train.parquet", draw_examples(num_train, seed=1, **lengths))
    write_split(folder / "eval.parquet", draw_examples(num_eval, seed=2, **lengths), prefix="eval")
    return folder


def read_tokens(split: Path, **training: Any) -> tuple[TokenTable, Sequence[Sequence[int]]]:
    """Lay a split out as a training with these settings does; return its examples and rows."""
    with tempfile.TemporaryDirectory() as folder:
        lay_out(split, Path(folder), TrainingConfig(**training))
        return open_rows(Path(folder))


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))
