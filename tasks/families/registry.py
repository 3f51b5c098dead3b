"""What is particular about a family of models: one row each. Whatever has no row follows the general rules.

A row is added where a tiny model of the family does not pass the matrix of families (tests/families), and says what is
so about it: linear weights that no adapter can stand beside, or why nothing of the family can be trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_READS_WEIGHT = "its module takes the weight itself, so that an adapter beside it would have no effect"
_MAMBA_KERNEL = "Mamba's kernels take the weight itself, so that an adapter beside it would have no effect"


@dataclass(frozen=True)
class Family:
    """What is particular about some model types of transformers."""

    model_types: tuple[str, ...]
    """Of the whole model, or of its text part."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Name of a module, and why no adapter stands beside the linear weights in it."""
    refused: str = ""
    """Why it is not trained here, and what would do, in words."""


FAMILIES = (
    Family(
        ("mamba", "falcon_mamba"),
        skipped={"out_proj": _MAMBA_KERNEL, "dt_proj": _READS_WEIGHT},
    ),
    Family(("mamba2", "falcon_h1", "nemotron_h"), skipped={"out_proj": _MAMBA_KERNEL}),
    Family(("jamba",), skipped={"dt_proj": _READS_WEIGHT}),
    Family(
        ("glm_moe_dsa", "deepseek_v32", "deepseek_v4"),
        skipped={"indexer": "it chooses the positions that attention reads, and such a choice has no gradient"},
    ),
    Family(
        ("gemma3n", "gemma3n_text"),
        skipped={"correction_coefs": _READS_WEIGHT},
    ),
)


def explain_skipped(family: Family, path: str) -> str:
    """Return why no adapter of a family stands beside the module at a path; empty where one may."""
    return next((family.skipped[name] for name in path.split(".") if name in family.skipped), "")


def find_family(config: Any) -> Family:
    """Return the row of a config's model type, or else of its text part's; an empty one where there is none."""
    types = (config.model_type, config.get_text_config().model_type)
    rows = (row for model_type in types for row in FAMILIES if model_type in row.model_types)
    return next(rows, Family(types))
