"""What a training will put through the model: its passes with their padding, made as the engines make them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from schemas.config import TrainingConfig
from tasks.decoder.passes import RecordingRule, Shape
from tasks.training.batches import FLAT_MULTIPLE
from tasks.training.engines.choice import CPU_TOKENS, GPU_TOKENS
from tasks.training.micro_batches import cut_flat_step, cut_padded_step
from tasks.training.packing import pack
from tasks.training.rows import choose_pack_tokens
from tasks.training.schedule import count_steps
from tasks.training.table_writer import EXAMPLES_PER_WINDOW
from tasks.training.token_table import TokenTable

_MOST_STEPS = 1000
"""Steps that are laid out; of more, these stand for all."""


@dataclass(frozen=True)
class PassLayout:
    """How an engine lays a step's rows out."""

    is_flat: bool
    """Examples end to end, else side by side with padding."""
    tokens_per_forward: int
    """Of a rank, or of those that share a pass."""
    recomputed: float = 0.0
    """Part of the layers that run again in the backward pass."""
    recording: RecordingRule | None = None
    """Which passes are recorded and replayed; None where none is."""


class _Pass(NamedTuple):
    """What an engine makes of some rows of a step."""

    tokens: int
    head_rows: int
    squares: int
    num_segments: int


@dataclass(frozen=True)
class ExampleLengths:
    """The lengths of a split's examples, and what stands in each row of a step."""

    table: TokenTable
    """With lengths alone."""
    trained: NDArray[Any]
    """[N] positions that are learned."""
    rows: list[list[int]]

    def count_step_tokens(self, config: TrainingConfig) -> int:
        """Return the most tokens that a step can hold."""
        lengths = sorted((int(self.table.lengths[row].sum()) for row in self.rows), reverse=True)
        return sum(lengths[: config.rows_per_step])


def read_examples(split: Path, config: TrainingConfig, *, share: float = 1.0) -> ExampleLengths:
    """Read the lengths of train.parquet, and make the rows of an epoch.

    Args:
        split: of a tokens folder.
        config: the training section.
        share: part of all conversations that was tokenized; those of the part stand for the others.
    """
    names = [("input_ids", "labels"), *([("rejected_ids", "rejected_labels")] if config.is_paired else [])]
    columns_read = [
        each
        for number, (ids, labels) in enumerate(names)
        for each in (
            pl.col(ids).list.len().cast(pl.Int64).alias(f"length {number}"),
            # A token is learned at the position before it: the first one never is.
            pl.col(labels)
            .list.slice(1)
            .list.eval(pl.element() != -100)
            .list.sum()
            .fill_null(0)
            .alias(f"trained {number}"),
        )
    ]
    counted = pl.scan_parquet(split).select(columns_read).collect()
    group, number = len(names), counted.height if share >= 1 else round(counted.height / share)
    columns = [
        np.stack(
            [np.resize(counted[f"{what} {each}"].cast(pl.Int64).to_numpy(), number) for each in range(group)], axis=1
        ).ravel()
        for what in ("length", "trained")
    ]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(columns[0])])
    nothing = np.zeros(0, np.int32)
    table = TokenTable([], offsets, nothing, nothing, group=group)
    return ExampleLengths(table, columns[1], _make_rows(table, config))


def _make_rows(table: TokenTable, config: TrainingConfig) -> list[list[int]]:
    """Return what stands in each row, packed as the training packs: window by window."""
    lengths, group = table.group_lengths, table.group
    if not config.packing:
        return [list(range(start, start + group)) for start in range(0, len(table.lengths), group)]
    budget = max(choose_pack_tokens(lengths, config), int(lengths.max(initial=0)))
    return [
        [(start + number) * group + place for number in row for place in range(group)]
        for start in range(0, len(lengths), EXAMPLES_PER_WINDOW)
        for row in pack(lengths[start : start + EXAMPLES_PER_WINDOW].tolist(), budget)
    ]


def foresee_work(
    examples: ExampleLengths, config: TrainingConfig, layout: PassLayout, *, seed: int
) -> dict[str, float]:
    """Return the counts of all steps of a training, as `tasks.training.step_work.count_work` counts them.

    Args:
        examples: of the training.
        config: the training section.
        layout: of the engine.
        seed: of the order.
    """
    rows = examples.rows
    per_step = config.rows_per_step
    steps_per_epoch, num_steps = count_steps(len(rows), config)
    counts, laid_out = np.zeros(5), min(num_steps, max(_MOST_STEPS, min(steps_per_epoch, 4 * _MOST_STEPS)))
    largest, recorded, num_new = 0, set[Shape](), 0
    for step in range(laid_out):
        epoch, position = divmod(step, steps_per_epoch)
        if not position:
            order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        window = [rows[row] for row in order[position * per_step : (position + 1) * per_step]]
        num_known = len(recorded)
        for each in _lay_out_step(examples, window, config, layout):
            shape = layout.recording and layout.recording.choose(each.tokens, each.head_rows, each.num_segments)
            if shape is not None:
                recorded.add(shape)
                each = each._replace(tokens=shape.num_tokens, head_rows=shape.num_trained)
            counts += (1, each.tokens, each.head_rows, each.squares, shape is not None)
            largest = max(largest, each.tokens)
        num_new += len(recorded) - num_known if step else 0  # the first step's is noted apart
    passes, tokens, head_rows, squares, replayed = (counts * num_steps / laid_out).tolist()
    return {
        "steps": float(num_steps),
        "passes": passes,
        "tokens": tokens,
        "head_rows": head_rows,
        "squares": squares,
        "replayed": replayed,
        "new_shapes": float(num_new * config.num_ranks),
        "largest_pass": float(largest),
        "recomputed": layout.recomputed,
        "flat": float(layout.is_flat),
        "ranks": float(config.num_ranks),
        "sharing": float(config.context_parallel),
    }


def _lay_out_step(
    examples: ExampleLengths, window: list[list[int]], config: TrainingConfig, layout: PassLayout
) -> list[_Pass]:
    """Return the passes of a step, without what recorded ones are filled up with."""
    lengths, trained = examples.table.lengths, examples.trained
    ranks = config.num_ranks
    found = []
    if layout.is_flat:
        num_parts = ranks // config.context_parallel
        for part in cut_flat_step(examples.table, window, layout.tokens_per_forward, num_parts=num_parts):
            own = lengths[part]
            tokens, learned = int(own.sum()), int(trained[part].sum())
            padding = -tokens % FLAT_MULTIPLE
            head_rows = learned + (-learned % FLAT_MULTIPLE if learned else FLAT_MULTIPLE)
            squares = int((own**2).sum()) + padding**2
            found.append(_Pass(tokens + padding, min(head_rows, tokens + padding), squares, len(own) + bool(padding)))
        return found
    row_lengths = np.array([int(lengths[row].sum()) for row in window])
    most = max(1, min(config.micro_batch, len(window) // ranks))
    for numbers in cut_padded_step(row_lengths, most, layout.tokens_per_forward):
        longest = int(row_lengths[numbers].max())
        learned = sum(int(trained[window[number]].sum()) for number in numbers)
        found.append(_Pass(len(numbers) * longest, learned, len(numbers) * longest**2, len(numbers)))
    return found


def foresee_layout(
    examples: ExampleLengths,
    config: TrainingConfig,
    *,
    is_gpu: bool,
    is_flat: bool = True,
    recomputed: float | None = None,
) -> PassLayout:
    """Return how the engine will lay a step's rows out, where its memory is large enough.

    Args:
        examples: of the training.
        config: the training section.
        is_gpu: whether a GPU trains.
        is_flat: whether the engine lays examples end to end.
        recomputed: part of the layers that run again; None: as the config says, or none.
    """
    if recomputed is None:
        recomputed = 1.0 if config.gradient_checkpointing else 0.0
    lengths = examples.table.lengths
    most = examples.count_step_tokens(config)
    if not is_flat:
        longest = max(int(lengths[row].sum()) for row in examples.rows)
        return PassLayout(False, config.micro_batch * longest, recomputed)
    if config.tokens_per_pack != "auto":
        most = min(most, max(config.tokens_per_pack, int(examples.table.group_lengths.max())))
    own = min(most, GPU_TOKENS if is_gpu else CPU_TOKENS)
    return PassLayout(True, own * config.context_parallel, recomputed)
