"""Which conversations are trained and which are held out, each exactly once.

The held-out part is chosen by rank: conversations are ordered by sha256 of seed and example_id, and the first ones are
held out. So the choice depends on the seed and the contents alone; neither the order of the rows, nor the number
of copies of one, matters, and a row added later moves at most one other row across the border.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from tasks.ingestion.identity import Conversation


class Split(NamedTuple):
    """Two sides, and what was taken out."""

    train: list[Conversation]
    eval: list[Conversation]
    duplicate: list[Conversation]
    leaked: list[Conversation]
    unused: list[Conversation]
    """Rows of a separate held-out dataset beyond the most that are evaluated; neither evaluated nor trained."""


def drop_duplicates(
    conversations: Sequence[Conversation], seen: set[str] | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the first of each example_id, and the others; `seen` are ids from before, and is added to."""
    seen = set() if seen is None else seen
    kept: list[Conversation] = []
    duplicate: list[Conversation] = []
    for conversation in conversations:
        (duplicate if conversation.example_id in seen else kept).append(conversation)
        seen.add(conversation.example_id)
    return kept, duplicate


def choose(conversations: Sequence[Conversation], num_rows: int, seed: int) -> set[str]:
    """Return the example_ids of `num_rows` conversations, chosen by seed and content."""

    def rank(example_id: str) -> bytes:
        return hashlib.sha256(f"{seed}:{example_id}".encode()).digest()

    return set(sorted({conversation.example_id for conversation in conversations}, key=rank)[:num_rows])


def count_held_out(num_rows: int, fraction: float, max_rows: int) -> int:
    """Return how many of `num_rows` are held out: at least one, and one stays to be trained."""
    return max(0, min(max(1, round(fraction * num_rows)), max_rows, num_rows - 1))


def split_rows(conversations: Sequence[Conversation], fraction: float, max_rows: int, seed: int) -> Split:
    """Hold out a seeded part of one dataset.

    Duplicates go first, so that no conversation can be on both sides; what is left in training that a held-out
    conversation equals up to case and spaces is a leak, and goes too.
    """
    kept, duplicate = drop_duplicates(conversations)
    chosen = choose(kept, count_held_out(len(kept), fraction, max_rows), seed)
    held_out = [row for row in kept if row.example_id in chosen]
    train, leaked = drop_leaks([row for row in kept if row.example_id not in chosen], held_out)
    return Split(train, held_out, duplicate, leaked, [])


def keep_all(conversations: Sequence[Conversation]) -> Split:
    """Train all of a dataset but its duplicates."""
    kept, duplicate = drop_duplicates(conversations)
    return Split(kept, [], duplicate, [], [])


def hold_out(conversations: Sequence[Conversation], max_rows: int, seed: int) -> Split:
    """Evaluate a separate held-out dataset: a seeded choice of at most `max_rows` conversations."""
    kept, duplicate = drop_duplicates(conversations)
    chosen = choose(kept, max_rows, seed)
    evaluated = [row for row in kept if row.example_id in chosen]
    return Split([], evaluated, duplicate, [], [row for row in kept if row.example_id not in chosen])


def separate(splits: Sequence[Split]) -> list[Split]:
    """Take out what several datasets have, so that it is in one place.

    A conversation held out of two datasets, or trained from two, stays with the first one. What is held out of any
    dataset, evaluated or not, is a leak in the training part of every other.
    """
    held_out = [row for split in splits for row in (*split.eval, *split.unused)]
    evaluated: set[str] = set()
    trained: set[str] = set()
    separated = []
    for split in splits:
        kept, leaked = drop_leaks(split.train, held_out)
        eval_rows, eval_copies = drop_duplicates(split.eval, evaluated)
        unused, unused_copies = drop_duplicates(split.unused, evaluated)
        train_rows, train_copies = drop_duplicates(kept, trained)
        duplicate = [*split.duplicate, *train_copies, *eval_copies, *unused_copies]
        separated.append(Split(train_rows, eval_rows, duplicate, [*split.leaked, *leaked], unused))
    return separated


def drop_leaks(
    train: Sequence[Conversation], held_out: Sequence[Conversation]
) -> tuple[list[Conversation], list[Conversation]]:
    """Return the training rows without, and those with, a held-out conversation in them.

    A row leaks when it is a held-out conversation, or begins with one, up to case, width, spaces and system
    message.
    """
    held_out_keys = {row.keys[-1] for row in held_out}
    kept: list[Conversation] = []
    leaked: list[Conversation] = []
    for row in train:
        (kept if held_out_keys.isdisjoint(row.keys) else leaked).append(row)
    return kept, leaked


def count_shared_prompts(train: Sequence[Conversation], held_out: Sequence[Conversation]) -> int:
    """Return how many held-out prompts a training row has too, with another answer."""
    prompts = {row.prompt_key for row in train}
    return sum(row.prompt_key in prompts for row in held_out)
