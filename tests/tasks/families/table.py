"""docs/models.md, made of what the matrix of families measured."""

import re
from collections.abc import Mapping
from pathlib import Path

from tasks.families.adaptation import CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTER
from tests.tasks.families.matrix import Outcome

TABLE = Path(__file__).parents[3] / "docs" / "models.md"
_LEFT_ALONE = (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS)
_HEAD = """# Which models run, and how

Made by `SFT_FAMILIES=all pytest tests/tasks/families/test_matrix.py`. For each family the test trains a tiny model with
random weights (`target_modules: all-linear`), merges it, and compares the merged model with the base, tensor by tensor.
It loads the merged model again and compares it with base + adapter (fp32, on a CPU). Families are named as in
`model_type` of `config.json`.

- **Engine**: fused, or the model's own forward pass (general). FP8 weights (`base_weights: fp8`) need the fused engine:
  attention and gated layers, shared and routed experts are in 8 bits, routers in 16. Routed experts lie in memory once,
  in half the bytes; the others twice, once for each direction.
  NF4 packs linear layers; experts that lie in one parameter stay in 16 bits. A run of the general engine says why it is
  that one: Gemma 2 caps its attention's scores, Gemma 3n has several
  streams.
- **Adapted**: how many linear weights of the text decoder have an adapter, of how many. Routed experts of a layer that
  lie in one parameter count as one weight. Routers, the output head and embeddings have none unless they are named.
  Image and audio parts of a model never have one; the merged model has them unchanged.
- **Packing**: examples in one row lie end to end. Where a family's layers would mix them they are padded, side by side.
- **Merge**: how many tensors of the files changed, and how many are the base's, byte for byte.
- **Packed checkpoints**: matrices in MXFP4 (gpt-oss) or FP8 (`quant_method: fp8`, with a factor for each block of
  values or for each matrix) are unpacked into 16 bits, and the merged model has them so. Checkpoints of GPTQ, AWQ,
  bitsandbytes or compressed-tensors are refused: the unquantized model is wanted.

A family that is not here follows the same general rules. What cannot be trained is said before anything is evaluated.
Engine and packing are chosen by a trial at every start, so that another shape of a family may have others.

| family | engine | adapted | not adapted, beside routers and head | packing | merge |
|---|---|---|---|---|---|
"""


def write_table(outcomes: Mapping[str, Outcome]) -> None:
    """Write the table of all families."""
    rows = [_write_row(outcomes[case]) for case in sorted(outcomes)]
    TABLE.write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")


def name_rows(text: str) -> list[str]:
    """Return the families that a table has rows of."""
    return re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)


def read_engine(text: str, case: str) -> str:
    """Return the engine that a table's row of a family says."""
    found = re.search(rf"^\| `{re.escape(case)}` \| (\w+) \|", text, flags=re.MULTILINE)
    assert found is not None
    return found[1]


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
