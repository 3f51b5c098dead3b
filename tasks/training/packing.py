"""Examples into packs of a fixed token budget, none of them split."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence


def pack(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Put examples into packs by best fit, longest first.

    Each example goes into the pack with the least room that still takes it, or opens a new one. Best-fit decreasing
    needs at most 11/9 of the fewest packs, plus one (D. S. Johnson, 1973). The order depends on the lengths alone.

    Args:
        lengths: Tokens of each example, at least 1.
        tokens_per_pack: Token budget of a pack.

    Returns:
        The packs, as indices into `lengths`; every index occurs once. `[]` without examples.

    Raises:
        ValueError: an example has no tokens, or more than a pack holds.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= tokens_per_pack:
            raise ValueError(
                f"example {index} has {length} tokens, and a pack holds 1 to {tokens_per_pack}: raise "
                "training.tokens_per_pack or lower tokenization.max_length"
            )
    packs: list[list[int]] = []
    rooms: list[int] = []  # the distinct amounts of room that some open pack has, ascending
    by_room: dict[int, list[int]] = defaultdict(list)
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, chosen = tokens_per_pack, len(packs)
            packs.append([])
        else:
            room = rooms[place]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        packs[chosen].append(index)
        left = room - length
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(chosen)
    return packs


def packing_efficiency(lengths: Sequence[int], packs: Sequence[Sequence[int]], tokens_per_pack: int) -> float:
    """Return the part of the packs' tokens that examples fill, 0 to 1; `nan` without packs."""
    return sum(lengths) / (len(packs) * tokens_per_pack) if packs else float("nan")
