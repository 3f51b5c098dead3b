"""docs/models.md, made of what the matrix of families measured."""

import re
from collections.abc import Mapping
from pathlib import Path

from tasks.families.adaptation import CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTER
from tests.tasks.families.matrix import Outcome

TABLE = Path(__file__).parents[3] / "docs" / "models.md"
_LEFT_ALONE = (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS)
_HEAD = """# Which models run, and how

Made by `SFT_FAMILIES=all pytest tests/tasks/families/test_matrix.py`: a tiny model of each family with random weights
is trained with `target_modules: all-linear`, merged, compared with the base tensor by tensor, loaded again and compared
with base + adapter (fp32, on a CPU). Families are named as in `model_type` of `config.json`.

- **Engine**: fused, or the model's own forward pass (general). FP8 weights (`base_weights: fp8`) go with the fused
  engine only. NF4 packs linear layers; experts that lie in one parameter stay in 16 bits.
- **Adapted**: linear weights of the text decoder that the adapter stands beside, of all; routed experts of a layer that
  lie in one parameter count as one weight. Routers, the output head and embeddings are left alone unless they are
  named. The image and audio parts of a composite always are; it comes back whole from the merge.
- **Packing**: packed examples lie end to end, or are padded side by side because the family's layers would mix them.
- **Merge**: tensors of the files that changed, and that are the base's byte for byte.

A family that is not here follows the general rules; before anything is evaluated a run says what it cannot do. The
trial at every start decides on engine and packing, so that other shapes of a family may have others.

| family | engine | adapted | not adapted, beside routers and head | packing | merge |
|---|---|---|---|---|---|
"""


def write_table(outcomes: Mapping[str, Outcome]) -> None:
    """Write the table of all families."""
    rows = [_write_row(outcomes[case]) for case in sorted(outcomes)]
    TABLE.write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")


def name_rows(text: str) -> list[str]:
    """Return the families that a table has rows of."""
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)


def _write_row(outcome: Outcome) -> str:
    linear = [row for row in outcome.adapted if row.kind not in _LEFT_ALONE]
    parts = ", ".join(f"{row.kind} {row.num_adapted} of {row.num_weights}" for row in linear)
    skipped = "; ".join(_shorten(sentence) for row in linear for sentence in row.skipped)
    cells = (
        f"`{outcome.case}`",
        outcome.engine,
        parts,
        skipped,
        outcome.packing,
        f"{outcome.num_changed} changed, {outcome.num_kept} kept",
    )
    return "| " + " | ".join(cells) + " |"


def _shorten(sentence: str) -> str:
    """Return a weight's last names and why it is not adapted."""
    found = re.search(r"such as (\S+) \((.*)\)$", sentence)
    assert found is not None
    return f"`{'.'.join(found[1].removesuffix('.weight').split('.')[-2:])}`: {found[2]}"
