"""Tiny base models, adapters that say something, and a tokenizer with a chat template, all made by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 1,
}
ALL_LINEAR = {"target_modules": "all-linear"}
PROMPTS = [[5, 6, 7], [8], [20, 30, 40, 50, 60], [11, 12]]
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}: {{ message['content'] }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant: {% endif %}"
)


def build_base(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = True, shard_size: str = "5GB") -> Path:
    """Save a Qwen3-shaped model when tied, a Llama-shaped one when not."""
    torch.manual_seed(0)
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True))
        if tied
        else LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    )
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model with plain transformers calls."""
    kind = Qwen3ForCausalLM if "Qwen3" in (folder / "config.json").read_text() else LlamaForCausalLM
    return kind.from_pretrained(folder, dtype=dtype).eval()


def build_adapter(base_model: Path, folder: Path, *, strength: float = 0.3, **settings: Any) -> Path:
    """Save an adapter whose B matrices (and fully trained modules) were moved as training would."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **{**ALL_LINEAR, **settings})
    model = get_peft_model(load(base_model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "modules_to_save" in name):
                parameter.add_(strength * torch.randn_like(parameter))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapter(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(base_model, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose end of turn (95) is not its eos (1)."""
    vocabulary = {chr(33 + i): i + 2 for i in range(90)} | {"<pad>": 0, "</s>": 1, "Ġ": 92}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    wrapped.add_tokens(["<|spare|>", "<|start|>", "<|stop|>"], special_tokens=True)
    assert wrapped.convert_tokens_to_ids(["</s>", "<|stop|>"]) == [1, 95]
    wrapped.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    wrapped.save_pretrained(folder)
    return folder
