"""Greedy answers to many prompts: no randomness, and the same tokens whatever the batch."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tasks.evaluation.flat import UnsupportedModelError
from tasks.evaluation.memory import shrink_until_it_fits
from tasks.evaluation.padded import cut_batches, decode_padded, try_ways
from tasks.evaluation.slots import Prompt, SlotDecoder, check_slots, choose_num_slots
from tasks.prompts import DEFAULT_SETTINGS, PromptSettings, make_prompt

PADDED_BATCH = 16
"""Rows of a padded batch where the config leaves it open."""

Progress = Callable[[int], None]
"""Called with the number of rows that have just been finished."""

logger = logging.getLogger(__name__)


def ignore_progress(num_rows: int) -> None:
    """Take a progress report and do nothing with it."""


def generate_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    batch_size: int | Literal["auto"] = "auto",
    on_progress: Progress = ignore_progress,
) -> list[list[int]]:
    """Continue each prompt with its most likely tokens until a stop id, the limit, or the end of the context.

    Prompts of similar length go together, so that little is done for nothing. Logits are taken as they are: no penalty,
    temperature or suppressed token of the model's generation config plays a part.

    Args:
        model: causal language model, in eval mode.
        prompts: token ids; none may be empty.
        stop_ids: ids that end an answer.
        max_new_tokens: most tokens of an answer.
        batch_size: prompts decoded at once; auto: as many as the free memory of a GPU holds, 16 on a CPU. Where it
            turns out to be too many for the memory, half as many go on.
        on_progress: called from time to time with the rows that have been finished since.

    Returns:
        The new tokens of each prompt, without the stop id; empty where the model stops at once.
    """
    rooms = [min(max_new_tokens, context_length(model) - len(prompt)) for prompt in prompts]
    answers: dict[int, list[int]] = {row: [] for row, room in enumerate(rooms) if room <= 0}
    if answers:
        on_progress(len(answers))
    # Longest first: what does not fit into memory fails at the start and not at the end.
    order = sorted(set(range(len(prompts))) - set(answers), key=lambda row: -len(prompts[row]))
    waiting = [Prompt(row, prompts[row], rooms[row]) for row in order]
    if waiting:
        _decode(model, waiting, answers, stop_ids, batch_size, on_progress)
    return [answers[row] for row in range(len(prompts))]


def _decode(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    answers: dict[int, list[int]],
    stop_ids: frozenset[int],
    batch_size: int | Literal["auto"],
    on_progress: Progress,
) -> None:
    """Put the answers by row into `answers`: in slots on a GPU where the model allows it, else in padded batches."""
    if model.device.type == "cuda":
        try:
            bytes_per_token = check_slots(model)
        except UnsupportedModelError as error:
            logger.warning("Answers are made in padded batches, which is slower: %s", error)
        else:
            size = choose_num_slots(prompts, bytes_per_token, model.device) if batch_size == "auto" else batch_size
            work = partial(decode_in_slots, model, prompts, answers, stop_ids, on_progress)
            shrink_until_it_fits(work, min(size, len(prompts)), name="evaluation.batch_size")
            return
    size = PADDED_BATCH if batch_size == "auto" else batch_size
    work = partial(decode_in_batches, model, prompts, answers, stop_ids, on_progress)
    shrink_until_it_fits(work, min(size, len(prompts)), name="evaluation.batch_size")


def decode_in_slots(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    answers: dict[int, list[int]],
    stop_ids: frozenset[int],
    on_progress: Progress,
    num_slots: int,
) -> None:
    """Put the answers that are still missing, by row, into `answers`; slots that fall free are taken again."""
    missing = [prompt for prompt in prompts if prompt.row not in answers]
    decoder = SlotDecoder(
        model,
        num_slots=num_slots,
        slot_length=max(len(prompt.tokens) + prompt.room for prompt in missing),
        longest_answer=max(prompt.room for prompt in missing),
        stop_ids=stop_ids,
    )
    decoder.decode(missing, answers, on_progress)


def decode_in_batches(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    answers: dict[int, list[int]],
    stop_ids: frozenset[int],
    on_progress: Progress,
    batch_size: int,
) -> None:
    """Put the answers that are still missing, by row, into `answers`; one padded batch after the other."""
    missing = [prompt for prompt in prompts if prompt.row not in answers]
    ways = try_ways(model)
    for places in cut_batches([len(prompt.tokens) for prompt in missing], batch_size, ways):
        batch = [missing[place] for place in places]
        tokens, rooms = [prompt.tokens for prompt in batch], [prompt.room for prompt in batch]
        for prompt, answer in zip(batch, decode_padded(model, tokens, rooms, stop_ids, ways), strict=True):
            answers[prompt.row] = answer
        on_progress(len(batch))


def context_length(model: PreTrainedModel) -> int:
    """Return the most tokens that the model's config allows in one sequence; very large where it names no limit."""
    return read_limit(model.config)


def read_limit(config: PretrainedConfig) -> int:
    """Return the most tokens of one sequence that a config allows; very large where it names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
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


def render_questions(
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    settings: PromptSettings = DEFAULT_SETTINGS,
    *,
    system: str = "",
) -> list[list[int]]:
    """Turn each question into the ids of a conversation's first turn, ready for the answer, as serving does.

    Args:
        questions: a user message each.
        tokenizer: with its chat template.
        settings: saved beside the tokenizer.
        system: message before each; none where it is empty.

    Raises:
        ValueError: the tokenizer has no chat template, or it refuses a question.
    """
    if questions and not tokenizer.chat_template:
        raise ValueError(
            "evaluation.questions: the tokenizer has no chat template to ask them with: set model.chat_template"
        )
    prompts: list[list[int]] = []
    for question in questions:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question})
        try:
            prompts.append(make_prompt(tokenizer, settings, messages))
        except TemplateError as error:
            raise ValueError(
                f"evaluation.questions: the chat template refuses {question!r:.80}"
                + (" with evaluation.system_message before it" if system else "")
                + f" ({error}): leave it out, or set model.chat_template"
            ) from None
    return prompts


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Return the tokens as text, without special tokens and with spaces as they are."""
    text: Any = tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)
