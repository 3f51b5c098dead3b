"""Greedy answers in left-padded batches: no randomness, and the same tokens whatever the batch.

Dimensions: `B` rows of a batch, `T` tokens of a row with its padding, `K` kept positions, `V` vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int], None]
"""Called with the number of rows that have just been finished."""


def ignore_progress(num_rows: int) -> None:
    """Take a progress report and do nothing with it."""


def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Progress = ignore_progress,
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens until a stop id, the limit, or the end of the context.

    Prompts of similar length share a batch, so that padding is small. Logits are taken as they are: no penalty,
    temperature or suppressed token of the model's generation config plays a part.

    Args:
        model: causal language model, in eval mode.
        prompts: token ids; none may be empty.
        stop_ids: ids that end an answer.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts decoded at once.
        on_progress: called after each batch.

    Returns:
        The new tokens of each prompt, without the stop id; empty where the model stops at once.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    # Longest first: a batch that does not fit into memory fails at the start and not at the end.
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        decoded = _decode_batch(model, [prompts[row] for row in rows], stop_ids, max_new_tokens)
        for row, tokens in zip(rows, decoded, strict=True):
            answers[row] = tokens
        on_progress(len(rows))
    return answers


@torch.inference_mode()
def _decode_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """Decode one batch; a row that has ended leaves it, so that the others get cheaper."""
    answers: list[list[int]] = [[] for _ in prompts]
    room = [min(max_new_tokens, context_length(model) - len(prompt)) for prompt in prompts]
    rows = [row for row in range(len(prompts)) if room[row] > 0]
    if not rows:
        return answers
    input_ids, mask, positions = pad_left([prompts[row] for row in rows], model.device)
    cache = None
    while True:
        logits, cache = forward(model, input_ids, mask, positions, cache=cache, use_cache=True, keep=1)
        tokens = logits[:, -1].argmax(dim=-1).tolist()
        for row, token in zip(rows, tokens, strict=True):
            if token not in stop_ids:
                answers[row].append(token)
        # Indices into the present batch of the rows that go on.
        alive = [
            at
            for at, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if token not in stop_ids and len(answers[row]) < room[row]
        ]
        if not alive:
            return answers
        if len(alive) < len(rows):
            index = torch.tensor(alive, device=model.device)
            cache.reorder_cache(index)
            mask, positions = mask[index], positions[index]
            rows, tokens = [rows[at] for at in alive], [tokens[at] for at in alive]
        input_ids = torch.tensor(tokens, device=model.device).unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input_ids, attention mask and position_ids, each `[B, T]`, with the rows ending in the last column.

    Positions count from 0 at each row's first token. The padding's id is 0 and never seen: the mask hides it.
    """
    assert all(rows), "an empty row has no last token to continue from"
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        input_ids[at, width - len(row) :] = torch.tensor(row)
        mask[at, width - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return input_ids.to(device), mask.to(device), positions.to(device)


def forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    *,
    cache: Any,
    use_cache: bool,
    keep: int,
) -> tuple[torch.Tensor, Any]:
    """Return the logits `[B, K, V]` of the last `keep` positions, and the cache.

    `input_ids` and `positions` hold the new columns only, `mask` also those that are in the cache already.
    """
    # Some architectures have no positions to give (ALiBi) or cannot restrict the logits.
    known = inspect.signature(model.forward).parameters
    optional = {"position_ids": positions, "logits_to_keep": keep}
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=use_cache,
        **{name: value for name, value in optional.items() if name in known},
    )
    return output.logits[:, -keep:], output.past_key_values if use_cache else None


def context_length(model: PreTrainedModel) -> int:
    """Return the most tokens that the model's config allows in one sequence; very large where it names no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2**31


def find_stop_ids(
    configs: Iterable[GenerationConfig | None],
    tokenizer: PreTrainedTokenizerBase,
    targets: Iterable[Sequence[int]] = (),
) -> frozenset[int]:
    """Collect the ids that end an answer.

    They are the eos ids of the generation configs (the model's, and the one that ships with the tokenizer) and of the
    tokenizer, and each added token with which a reference answer ends: a base model's eos is often not the end of
    turn of the chat template.
    """
    stop_ids: set[int] = set()
    for eos in (*(config.eos_token_id for config in configs if config is not None), tokenizer.eos_token_id):
        stop_ids.update([eos] if isinstance(eos, int) else eos or ())
    # Only added tokens: an answer cut for length may end in any word.
    added = set(tokenizer.added_tokens_decoder)
    return frozenset(stop_ids | ({target[-1] for target in targets if target} & added))


def render_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Turn each question into the ids of a conversation's first turn, ready for the answer.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if questions and not tokenizer.chat_template:
        raise ValueError(
            "evaluation.questions: the tokenizer has no chat template to ask them with: set model.chat_template"
        )
    prompts: list[list[int]] = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        prompts.append(list(ids))
    return prompts


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the tokens as text, without special tokens and with spaces as they are."""
    text: Any = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
