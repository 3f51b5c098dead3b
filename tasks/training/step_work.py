"""What a step's time and memory go by, counted on the batches that it made."""

from collections.abc import Sequence

from tasks.decoder.passes import RecordingRule, Shape
from tasks.training.batches import Batch


def choose_recorded(rule: RecordingRule | None, batch: Batch) -> Shape | None:
    """Return the shape that a flat batch is filled up to and replayed in; None where it is not.

    Args:
        rule: of the engine; None where it records nothing.
        batch: with segments and trained positions, where there is a rule.
    """
    if rule is None:
        return None
    assert batch.segments is not None
    assert batch.trained is not None
    return rule.choose(batch.input_ids.numel(), len(batch.trained), len(batch.segments.lengths))


def count_work(
    batches: Sequence[Batch], rule: RecordingRule | None = None, recorded: set[Shape] | None = None
) -> dict[str, int]:
    """Return passes, tokens and rows of the head with what they are filled up with, and squares of lengths.

    And how many passes are replayed, how many of these have a shape that is recorded for it, and the tokens of the
    largest pass, by which the memory goes. What other ranks do counts as what this one does for as many tokens, where
    this one did not form it.

    Args:
        batches: of the step.
        rule: of the engine; None where it records nothing.
        recorded: shapes that there are; those of this step are added.
    """
    own = [batch for batch in batches if not batch.is_elsewhere]
    if len(own) < len(batches):
        share = sum(batch.num_tokens for batch in own) / sum(batch.num_tokens for batch in batches)
        counts = count_work(own, rule, recorded)
        largest = counts.pop("largest_pass")
        return {name: round(count / share) for name, count in counts.items()} | {"largest_pass": largest}
    shapes = [choose_recorded(rule, batch) for batch in batches]
    tokens = [
        batch.input_ids.numel() if shape is None else shape.num_tokens
        for batch, shape in zip(batches, shapes, strict=True)
    ]
    rows = [
        batch.num_head_rows if shape is None else shape.num_trained
        for batch, shape in zip(batches, shapes, strict=True)
    ]
    replayed = {shape for shape in shapes if shape is not None}
    new = replayed - (recorded if recorded is not None else set())
    if recorded is not None:
        recorded |= new
    return {
        "passes": len(batches),
        "tokens": sum(tokens),
        "head_rows": sum(rows),
        "squares": sum(batch.num_squares for batch in batches),
        "replayed": sum(shape is not None for shape in shapes),
        "new_shapes": len(new),
        "largest_pass": max(tokens),
    }
