"""masks.json: what was masked, cut, kept as text and refused, so that a person can trust the labels."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from schemas.plurals import count_of
from tasks.tokenization.containment import DROPPED
from tasks.tokenization.encoding import decode
from tasks.tokenization.labels import IGNORE_INDEX, Example
from tasks.tokenization.tables import Columns

NUM_SAMPLES = 5
_HISTOGRAM_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass
class MaskReport:
    """Counts of one split, added up batch by batch and shard by shard; as large for a million rows as for ten."""

    num_conversations: int = 0
    num_examples: int = 0
    num_split_conversations: int = 0
    """Conversations that became several examples."""
    num_truncated: int = 0
    """Examples whose prompt or answer was cut."""
    num_too_long: int = 0
    """Conversations rejected for length."""
    num_literals: int = 0
    """Control tokens spelled in contents and kept as text."""
    num_eos_appended: int = 0
    """Trained messages that got eos because the template writes no end of turn."""
    num_checked: int = 0
    """Conversations assembled without rendering that were rendered as well, to compare."""
    num_rendered_anew: int = 0
    """Conversations of row groups that were made again by rendering each, as one had been assembled otherwise."""
    num_groups_rendered: int = 0
    """Those row groups."""
    num_pairs: int = 0
    """Examples beside which there is one with an answer that is not preferred."""
    num_rejected_truncated: int = 0
    """Pairs of which the other alone was cut."""
    num_ending: int = 0
    """Examples whose last trained id ends a generation."""
    total_tokens: int = 0
    trained_tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """What the template leaves out and tokenization.allow_dropped allows, by the names there."""
    literal_endings: Counter[str] = field(default_factory=Counter)
    """Control tokens spelled at the end of trained answers, which the model learns to write out."""
    endings: Counter[int] = field(default_factory=Counter)
    """Added tokens that trained answers end with, by id."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Examples by number of tokens; there are at most tokenization.max_length of these numbers."""
    trained: Counter[int] = field(default_factory=Counter)
    """Examples by number of trained tokens."""
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)
    """The first examples, as runs of text and whether it is trained."""
    rejected_samples: list[list[tuple[str, bool]]] = field(default_factory=list)
    """The first examples of answers that are not preferred, as those."""
    differences: list[str] = field(default_factory=list)
    """What was assembled otherwise than rendered, first of all."""

    def reject(self, reason: str) -> None:
        """Count a conversation that becomes no example."""
        self.num_conversations += 1
        self.rejected[reason] += 1
        self.num_too_long += reason in ("answer_too_long", "prompt_too_long")

    def add(
        self, examples: Sequence[Example], columns: Columns, stops: Sequence[int], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Count a batch's examples."""
        if not examples:
            return
        is_trained = columns.labels != IGNORE_INDEX
        num_trained = np.add.reduceat(is_trained, columns.offsets[:-1], dtype=np.int64)
        assert num_trained.all(), f"an example without trained tokens: {examples[int(num_trained.argmin())].target!r}"
        self.num_examples += len(examples)
        self.num_truncated += sum(example.truncated for example in examples)
        self.num_eos_appended += sum(not example.closed for example in examples)
        self.num_ending += int(np.isin(columns.labels[columns.offsets[1:] - 1], stops).sum())
        self._count_endings(columns, stops, tokenizer)
        self.total_tokens += columns.input_ids.size
        self.trained_tokens += int(num_trained.sum())
        self.lengths.update(_count(columns.lengths))
        self.trained.update(_count(num_trained))
        for number in range(min(len(examples), NUM_SAMPLES - len(self.samples))):
            span = slice(columns.offsets[number], columns.offsets[number + 1])
            self.samples.append(color_runs(columns.input_ids[span], is_trained[span], tokenizer))

    def add_rejected(
        self,
        chosen: Sequence[Example],
        examples: Sequence[Example],
        columns: Columns,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Count the tokens of the answers that are not preferred, one for each example of a batch."""
        is_trained = columns.labels != IGNORE_INDEX
        self.num_pairs += len(examples)
        pairs = zip(chosen, examples, strict=True)
        self.num_rejected_truncated += sum(other.truncated and not own.truncated for own, other in pairs)
        self.total_tokens += columns.input_ids.size
        self.trained_tokens += int(is_trained.sum())
        for number in range(min(len(examples), NUM_SAMPLES - len(self.rejected_samples))):
            span = slice(columns.offsets[number], columns.offsets[number + 1])
            self.rejected_samples.append(color_runs(columns.input_ids[span], is_trained[span], tokenizer))

    def _count_endings(self, columns: Columns, stops: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
        """Count the added tokens that a trained answer ends with: a trained id before one that is not."""
        is_trained = columns.labels != IGNORE_INDEX
        is_last = is_trained & ~np.append(is_trained[1:], False)
        is_last[columns.offsets[1:] - 1] = is_trained[columns.offsets[1:] - 1]
        found = _count(columns.labels[is_last].astype(np.int64))
        added = {*tokenizer.added_tokens_decoder, *stops}
        self.endings.update({index: number for index, number in found.items() if index in added})

    def merge(self, other: "MaskReport") -> None:
        """Add the counts of a later shard."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)
        del self.samples[NUM_SAMPLES:], self.rejected_samples[NUM_SAMPLES:], self.differences[NUM_SAMPLES:]

    def warn(self) -> list[str]:
        """Return what went another way than it should, a sentence each."""
        warnings = []
        if (unending := self.num_examples - self.num_ending - self.num_truncated) > 0:
            warnings.append(
                f"{unending:,} of {self.num_examples:,} examples do not end in a token that ends a generation: the "
                "model learns not to stop there"
            )
        warnings += [
            f"the chat template leaves out {DROPPED[loss]} {count_of(number, 'time')}, as "
            "tokenization.allow_dropped allows"
            for loss, number in self.dropped.items()
        ]
        warnings += [
            f"{count_of(number, 'answer ends', 'answers end')} in the text {token!r}, which the model learns to "
            "write out before its end of turn: remove it from the rows, or set tokenization.allow_special_tokens"
            for token, number in self.literal_endings.items()
        ]
        if self.num_rendered_anew:
            warnings.append(
                f"{count_of(self.num_rendered_anew, 'conversation')} in "
                f"{count_of(self.num_groups_rendered, 'row group')} rendered one by one, which is slower: put together "
                f"from the template's parts, {self.differences[0]}. The "
                "labels are those of the rendering; please report the template"
            )
        return warnings

    def summary(self) -> dict[str, Any]:
        """Return the report as plain data."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {
            **counts,
            "rejected": dict(self.rejected),
            "dropped_by_template": dict(self.dropped),
            "literal_endings": dict(self.literal_endings),
            "ending_ids": dict(self.endings),
            "share_trained": self.trained_tokens / self.total_tokens if self.total_tokens else 0.0,
            "share_ending_in_end_of_turn": self.num_ending / self.num_examples if self.num_examples else 0.0,
            "tokens_per_example": describe_counts(self.lengths),
            "trained_tokens_per_example": describe_counts(self.trained),
            "differences": self.differences,
            "samples": [[{"text": text, "trained": trained} for text, trained in runs] for runs in self.samples],
            "rejected_samples": [
                [{"text": text, "trained": trained} for text, trained in runs] for runs in self.rejected_samples
            ],
        }


def color_runs(
    input_ids: NDArray[np.int32], is_trained: NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Return an example's text in runs of trained and untrained tokens, to be shown in two colours."""
    borders = [0, *(np.flatnonzero(np.diff(is_trained)) + 1).tolist(), len(is_trained)]
    return [
        (decode(tokenizer, input_ids[start:stop].tolist()), bool(is_trained[start]))
        for start, stop in pairwise(borders)
    ]


def _count(values: NDArray[np.int64]) -> dict[int, int]:
    """Return how often each value occurs."""
    distinct, numbers = np.unique(values, return_counts=True)
    return dict(zip(distinct.tolist(), numbers.tolist(), strict=True))


def describe_counts(numbers: Mapping[int, int]) -> dict[str, Any]:
    """Return quantiles and counts between powers of two, of values given with how often they occur."""
    if not numbers:
        return {"counts": {}, "min": 0, "median": 0, "p90": 0, "max": 0}
    values = sorted(numbers)
    weights = [numbers[value] for value in values]
    edges = [*_HISTOGRAM_EDGES, max(values[-1] + 1, _HISTOGRAM_EDGES[-1] + 1)]
    counts, _ = np.histogram(values, bins=edges, weights=weights)
    return {
        "counts": {f"{low}-{high - 1}": int(n) for (low, high), n in zip(pairwise(edges), counts, strict=True) if n},
        "min": values[0],
        "median": _quantile(values, weights, 0.5),
        "p90": _quantile(values, weights, 0.9),
        "max": values[-1],
    }


def _quantile(values: Sequence[int], weights: Sequence[int], share: float) -> float:
    """Return a quantile of repeated values, between two of them in proportion (as numpy's default)."""
    ends = np.cumsum(weights)
    position = share * (int(ends[-1]) - 1)
    low, high = (
        values[int(np.searchsorted(ends, rank, side="right"))] for rank in (math.floor(position), math.ceil(position))
    )
    return low + (high - low) * (position % 1)
