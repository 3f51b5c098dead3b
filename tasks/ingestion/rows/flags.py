"""Keys of a message that decide whether it is trained; a key that an example cannot carry is refused by name."""

from typing import Any

from tasks.ingestion.errors import RowError

TRAIN_KEYS = ("train", "weight", "loss_weight", "loss", "loss_scale", "training")
"""Each says whether an assistant message is trained: ours, OpenAI, LLaMA-Factory v1, ms-swift (two), Axolotl."""
WEIGHT_KEYS = frozenset({"weight", "loss_weight", "loss_scale"})
"""1 is how these say nothing: also prompts have it."""
REFUSED_KEYS: dict[str, str] = {
    "mask": "it is read in two contrary ways: write train: false on the messages that are not trained",
    "train_detail": "parts of a message cannot be trained apart: write train: true or false on the whole message",
    "training_detail": "parts of a message cannot be trained apart: write train: true or false on the whole message",
    "images": "only text is trained: remove these rows",
    "image": "only text is trained: remove these rows",
    "videos": "only text is trained: remove these rows",
    "audio": "only text is trained: remove these rows",
    "audios": "only text is trained: remove these rows",
    "attachments": "only text is trained: write what they say into the message",
    "documents": "only text is trained: write what they say into the message",
    "tool_plan": "write it as reasoning_content, or into the content",
    "rejected": "answers to be avoided are not trained: remove the key",
}
FLAG_KEYS = frozenset({*TRAIN_KEYS, *REFUSED_KEYS})


def check_refused(item: dict[str, Any], number: int) -> None:
    """Refuse a message with a key that changes its meaning and cannot be carried; an empty value says nothing.

    Raises:
        RowError: unread_meaning.
    """
    for key in item.keys() & REFUSED_KEYS.keys():
        if item[key] not in (None, False, "", [], {}):
            raise RowError(
                "unread_meaning", f"message {number} has {key} = {str(item[key])[:80]!r}: {REFUSED_KEYS[key]}"
            )


def read_train_flag(item: dict[str, Any], role: str, number: int) -> bool | float | None:
    """Return whether a message says that it is trained, or its weight between 0 and 1; None where it says nothing.

    Args:
        item: the message as it was read.
        role: our name of its role.
        number: its place from 1.

    Raises:
        RowError: bad_train_flag, where a flag is neither 0 nor 1 (a weight: nor between them), two disagree, or
            another's than the assistant's message is to be trained.
    """
    flags = {key: item[key] for key in TRAIN_KEYS if item.get(key) is not None}
    for key, flag in flags.items():
        is_number = isinstance(flag, (bool, int, float))
        if not is_number or not (0 <= flag <= 1 if key in WEIGHT_KEYS else flag in (0, 1)):
            wanted = "a number from 0 to 1" if key in WEIGHT_KEYS else "true or false (1 or 0)"
            raise RowError("bad_train_flag", f"message {number}: {key} is {flag!r}: {wanted} is wanted")
    weights = [flags[key] for key in flags if key in WEIGHT_KEYS]
    if len({bool(flag) for flag in flags.values()}) > 1 or len(set(weights)) > 1:
        raise RowError("bad_train_flag", f"message {number}: {flags} disagree: leave one of them")
    if not flags:
        return None
    value = bool(next(iter(flags.values())))
    if role == "assistant":
        return float(weights[0]) if weights and weights[0] not in (0, 1) else value
    told = next((key for key in flags if key not in WEIGHT_KEYS), None)
    if value and told is not None:
        raise RowError(
            "bad_train_flag",
            f"message {number} ({role}): {told} is true, and only the assistant's messages are trained: "
            "remove the flag, or set tokenization.train_on_prompt for the whole dataset",
        )
    return None


def read_row_weight(value: Any) -> float | None:
    """Return the weight from 0 to 1 that a column of this value gives a row; None where it gives none."""
    try:
        weight = float(value) if not isinstance(value, bool) else None
    except (TypeError, ValueError):
        return None
    return weight if weight is not None and 0 <= weight <= 1 else None


def weigh_answers(messages: list[dict[str, Any]], weight: float) -> None:
    """Multiply the weights of the answers that are trained; a weight of 0 is as not trained."""
    for message in messages:
        if message["role"] != "assistant" or message.get("train") is False:
            continue
        product = weight * message.get("weight", 1.0)
        if product == 0:
            message.pop("weight", None)
            message["train"] = False
        elif product != 1:
            message["weight"] = product
