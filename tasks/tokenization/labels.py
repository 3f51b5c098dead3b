"""Labels: made here, from the ids of an example and the spans of its trained turns, whoever found the spans."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["ID_TYPE", "IGNORE_INDEX", "Example", "make_labels", "write_ids"]

IGNORE_INDEX = -100
"""The label of a token that is not trained; PyTorch's cross entropy leaves it out."""
ID_TYPE = np.dtype(np.int32)


class Example(NamedTuple):
    """A sequence of `T` tokens, and which of them are trained."""

    ids: bytes
    """The token ids, as ID_TYPE."""
    spans: tuple[tuple[int, int], ...]
    """First position and the one behind the last, of each trained turn in order; they may touch."""
    turns: tuple[int, ...] = ()
    """Indices of the messages trained here."""
    target: str = ""
    """Text of the last of them, with its end of turn."""
    truncated: bool = False
    """Whether the prompt's contents or the answer were cut."""
    closed: bool = True
    """Whether the template writes the end of turn; if not, eos was appended."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids, `[T]`."""
        ids: list[int] = np.frombuffer(self.ids, ID_TYPE).tolist()
        return ids

    @property
    def labels(self) -> list[int]:
        """Labels, `[T]`."""
        spans = np.array(self.spans, np.int64).reshape(-1, 2)
        labels: list[int] = make_labels(np.frombuffer(self.ids, ID_TYPE), spans).tolist()
        return labels


def make_labels(input_ids: NDArray[np.int32], spans: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ids within the spans, and IGNORE_INDEX elsewhere.

    Args:
        input_ids: Of one example or of many end to end, `[S]`.
        spans: First position and the one behind the last, `[N, 2]`; in order, and not empty.

    Returns:
        Labels, `[S]`; the model's outputs are shifted against them by whoever computes the loss.
    """
    borders = spans.ravel()
    assert (np.diff(borders) >= 0).all(), "spans overlap or are not in order"
    assert (spans[:, 0] < spans[:, 1]).all(), "an empty span"
    assert not borders.size or (borders[0] >= 0 and borders[-1] <= input_ids.size), "a span outside the ids"
    # Runs without and with labels in turn, the first without.
    runs = np.diff(borders, prepend=0, append=input_ids.size)
    is_trained = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    return np.where(is_trained, input_ids, np.int32(IGNORE_INDEX))


def write_ids(input_ids: Sequence[int]) -> bytes:
    """Return ids as an example holds them."""
    return np.asarray(input_ids, ID_TYPE).tobytes()
