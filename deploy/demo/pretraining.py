"""Pretraining of the demo's base model from scratch, on one GPU or on CPU cores.

Dimensions: `B` rows of a batch, `S` tokens of a row, `V` vocabulary, `D` hidden size.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from deploy.demo.vocabulary import END_OF_TEXT, PAD, TURN_END, TURN_START


@dataclass(frozen=True)
class Recipe:
    """Sizes of the model and of its pretraining."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    steps: int = 3200
    batch: int = 64
    row_tokens: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup_fraction: float = 0.05
    max_grad_norm: float = 1.0


def build_model(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Qwen3ForCausalLM:
    """Return a Qwen3-shaped model with random weights from torch's current seed."""
    end_of_text, turn_end = _token_id(tokenizer, END_OF_TEXT), _token_id(tokenizer, TURN_END)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_text,
        pad_token_id=_token_id(tokenizer, PAD),
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[turn_end, end_of_text], pad_token_id=config.pad_token_id
    )
    return model


def pretrain(
    documents: list[str],
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    on_step: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
) -> Qwen3ForCausalLM:
    """Train a new model on the documents and return it in eval mode on the CPU.

    Args:
        documents: running text; every document ends with the end-of-text token.
        tokenizer: of the model.
        recipe: sizes.
        seed: of the weights and of the order of the documents.
        device: where to train; other devices give slightly other weights.
        on_step: called with the step, its loss in nats a token and the seconds since the start.
    """
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(tokenizer, recipe)
    torch.nn.Module.to(model, device).train()
    decayed = [weight for weight in model.parameters() if weight.dim() == 2 and weight.shape[0] != len(tokenizer)]
    others = [weight for weight in model.parameters() if weight.dim() != 2 or weight.shape[0] == len(tokenizer)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    warmup_steps = max(1, round(recipe.steps * recipe.warmup_fraction))
    rows = _Rows(documents, tokenizer, recipe, seed)
    started = time.perf_counter()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, warmup_steps, recipe.steps)
        input_ids = rows.take().to(device)  # [B, S]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=input_ids, use_cache=False).logits  # [B, S, V]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            on_step(step, loss.item(), time.perf_counter() - started)
    return place_markers(model.cpu().eval(), tokenizer, seed)


def place_markers(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Give the turn markers fresh random embeddings of the usual length.

    They stand in no text, so training only pushed them away from every context, both in one direction, and LoRA on the
    linear layers cannot move them: without this, the model can hardly say the end of a turn.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.model.embed_tokens.weight.data  # [V, D]
    usual_length = embeddings.norm(dim=1).mean()
    for token in (TURN_START, TURN_END):
        direction = torch.randn(embeddings.shape[1], generator=generator)
        embeddings[_token_id(tokenizer, token)] = direction * (usual_length / direction.norm())
    return model


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of one special token."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(token_id, int)
    return token_id


def _schedule(step: int, warmup_steps: int, steps: int) -> float:
    """Return the part of the peak learning rate: a linear rise, then a cosine down to 5 %."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


class _Rows:
    """Endless batches of rows: the documents in a new random order each pass, end to end, cut at `row_tokens`."""

    def __init__(self, documents: list[str], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, seed: int) -> None:
        end = _token_id(tokenizer, END_OF_TEXT)
        encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
        self.documents = [torch.tensor([*ids, end]) for ids in encoded]
        self.recipe = recipe
        self.generator = torch.Generator().manual_seed(seed)
        self.stream = torch.empty(0, dtype=torch.long)

    def take(self) -> torch.Tensor:
        """Return the next batch [B, S]."""
        wanted = self.recipe.batch * self.recipe.row_tokens
        while len(self.stream) < wanted:
            order = torch.randperm(len(self.documents), generator=self.generator).tolist()
            self.stream = torch.cat([self.stream, *(self.documents[index] for index in order)])
        batch, self.stream = self.stream[:wanted], self.stream[wanted:]
        return batch.view(self.recipe.batch, self.recipe.row_tokens)
