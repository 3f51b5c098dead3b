"""masks.json: what was masked, cut, kept as text and refused, so that a person can trust the labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasks.tokenization.encoding import decode
from tasks.tokenization.errors import MaskError
from tasks.tokenization.masking import IGNORE_INDEX, Example, Masked
from tasks.tokenization.templates import PreparedTokenizer

_NUM_SAMPLES = 5
_HISTOGRAM_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass
class MaskReport:
    """Counts of one split, added up batch by batch."""

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
    num_adapted: int = 0
    """Conversations with tool calls that the template takes only with arguments as text or an empty content."""
    num_ending: int = 0
    """Examples whose last trained id ends a generation."""
    total_tokens: int = 0
    trained_tokens: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Messages whose contents the template leaves out, by role, and reasoning left out."""
    lengths: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    samples: list[list[tuple[str, bool]]] = field(default_factory=list)

    def add(self, outcomes: Sequence[Masked | MaskError], prepared: PreparedTokenizer) -> None:
        """Count a batch."""
        stops = set(prepared.stop_token_ids)
        for outcome in outcomes:
            self.num_conversations += 1
            if isinstance(outcome, MaskError):
                self.rejected[outcome.reason] += 1
                self.num_too_long += outcome.reason in ("answer_too_long", "prompt_too_long")
                continue
            self.num_split_conversations += len(outcome.examples) > 1
            self.num_literals += outcome.num_literals
            self.dropped.update(outcome.dropped)
            for example in outcome.examples:
                self._add_example(example, stops, prepared)

    def _add_example(self, example: Example, stops: set[int], prepared: PreparedTokenizer) -> None:
        num_trained = len(example.labels) - example.labels.count(IGNORE_INDEX)
        assert num_trained, f"an example without trained tokens: messages {example.turns}"
        self.num_examples += 1
        self.num_truncated += example.truncated
        self.num_eos_appended += not example.closed
        self.num_ending += example.labels[-1] in stops
        self.total_tokens += len(example.input_ids)
        self.trained_tokens += num_trained
        self.lengths.append(len(example.input_ids))
        self.trained.append(num_trained)
        if len(self.samples) < _NUM_SAMPLES:
            self.samples.append(color_runs(example, prepared))

    def summary(self) -> dict[str, Any]:
        """Return the report as plain data."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return {
            **counts,
            "rejected": dict(self.rejected),
            "dropped_by_template": dict(self.dropped),
            "share_trained": self.trained_tokens / self.total_tokens if self.total_tokens else 0.0,
            "share_ending_in_end_of_turn": self.num_ending / self.num_examples if self.num_examples else 0.0,
            "tokens_per_example": _histogram(self.lengths),
            "trained_tokens_per_example": _histogram(self.trained),
            "samples": [[{"text": text, "trained": trained} for text, trained in runs] for runs in self.samples],
        }


def color_runs(example: Example, prepared: PreparedTokenizer) -> list[tuple[str, bool]]:
    """Return an example's text in runs of trained and untrained tokens, to be shown in two colours."""
    runs: list[tuple[str, bool]] = []
    start = 0
    flags = [label != IGNORE_INDEX for label in example.labels]
    for position in range(1, len(flags) + 1):
        if position == len(flags) or flags[position] != flags[start]:
            runs.append((decode(prepared.tokenizer, example.input_ids[start:position]), flags[start]))
            start = position
    return runs


def _histogram(values: Sequence[int]) -> dict[str, Any]:
    """Return quantiles and counts between powers of two."""
    if not values:
        return {"counts": {}, "min": 0, "median": 0, "p90": 0, "max": 0}
    array = np.asarray(values)
    edges = [*_HISTOGRAM_EDGES, max(int(array.max()) + 1, _HISTOGRAM_EDGES[-1] + 1)]
    counts, _ = np.histogram(array, bins=edges)
    return {
        "counts": {f"{low}-{high - 1}": int(n) for low, high, n in zip(edges, edges[1:], counts, strict=False) if n},
        "min": int(array.min()),
        "median": float(np.median(array)),
        "p90": float(np.quantile(array, 0.9)),
        "max": int(array.max()),
    }
