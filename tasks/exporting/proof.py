"""How near an export is to the model that it was made of, on answers to held-out rows.

Dimensions: `P` positions, `V` vocabulary.

Both models read the same tokens. At each position whose token is part of an answer their distributions are compared:
KL(parent || export) in nats, whether the most probable token is the same, and, where the parent ends the answer,
whether the export does too. One model is in memory at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor

from tasks.exporting.errors import ExportError
from tasks.models import choose_device, load_model
from tasks.tokenization.labels import IGNORE_INDEX

MOST_POSITIONS = 768
"""Of all rows: the parent's distributions are kept meanwhile, V fp32 values each."""


NEAR = 0.1
"""Nats by which the parent may prefer its own token: where several are as good, rounding decides."""


@dataclass(frozen=True)
class AnswerPlaces:
    """Tokens, and the positions whose next token is part of an answer."""

    input_ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class ExportProof:
    """What was found."""

    num_positions: int
    mean_kl: float
    """Nats."""
    largest_kl: float
    agreement: float
    """Part of the positions with the same most probable token."""
    acceptance: float
    """The same, where a token that the parent gives nearly as much counts too: see NEAR."""
    num_stops: int
    """Positions where the parent ends an answer."""
    stop_agreement: float
    """Part of these where the export ends it too, by the same token; 1 where there are none."""


def read_examples(table: Path, *, most: int = MOST_POSITIONS) -> list[AnswerPlaces]:
    """Return examples of a tokens folder's split, in order, up to so many positions."""
    found: list[AnswerPlaces] = []
    left = most
    for ids, labels in pl.read_parquet(table, columns=["input_ids", "labels"]).iter_rows():
        positions = [place - 1 for place, label in enumerate(labels) if label != IGNORE_INDEX and place][:left]
        if positions:
            found.append(AnswerPlaces(ids, positions))
        left -= len(positions)
        if left <= 0:
            break
    return found


def prove_export(parent: Path, export: Path, examples: Sequence[AnswerPlaces], stops: Sequence[int]) -> ExportProof:
    """Compare an export with its parent.

    Args:
        parent: folder of the model.
        export: folder that loads as a model, with the values of the export.
        examples: see `read_examples`.
        stops: ids that end a generation.

    Raises:
        ExportError: there is nothing to compare on.
    """
    if not examples:
        raise ExportError("no answer to compare the export on: the version's dataset has no row that gives an example")
    return compare_distributions(_read(parent, examples), _read(export, examples), stops)


def compare_distributions(parent: Tensor, export: Tensor, stops: Sequence[int]) -> ExportProof:
    """Compare log-probabilities [P, V] of two models at the same positions."""
    divergence = (parent.exp() * (parent - export)).sum(dim=-1).clamp(min=0.0)
    best, other = parent.argmax(dim=-1), export.argmax(dim=-1)
    same = best == other
    given_up = parent.max(dim=-1).values - parent.gather(-1, other[:, None])[:, 0]
    ends = torch.isin(best, torch.tensor(list(stops)))
    return ExportProof(
        num_positions=len(best),
        mean_kl=float(divergence.mean()),
        largest_kl=float(divergence.max()),
        agreement=float(same.double().mean()),
        acceptance=float((given_up <= NEAR).double().mean()),
        num_stops=int(ends.sum()),
        stop_agreement=float(same[ends].double().mean()) if ends.any() else 1.0,
    )


@torch.no_grad()
def _read(folder: Path, examples: Sequence[AnswerPlaces]) -> Tensor:
    """Return the log-probabilities [P, V] of the next token, fp32 on the CPU."""
    device = choose_device()
    model: Any = load_model(folder, dtype=torch.float32, device=device)
    rows = []
    for example in examples:
        logits = model(torch.tensor([example.input_ids], device=device), use_cache=False).logits[0]
        rows.append(logits[example.positions].float().log_softmax(dim=-1).cpu())
    return torch.cat(rows)
