"""One family through everything: load, attach, engine, two steps, merge, the law of what changed, reload, parity."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.artifacts import AdaptedWeights
from schemas.config import MergeConfig, TrainingConfig
from tasks.merging.parity import check_merge
from tasks.merging.shards import write_shards
from tasks.merging.verification import verify_tensors
from tasks.merging.weights import plan_merge
from tasks.training.loop import train_adapter
from tests.tasks.families.tiny import VOCABULARY, save_model
from tests.tasks.training.conftest import write_tokens

CONFIG = TrainingConfig(
    rank=4,
    alpha=8,
    learning_rate=1e-2,
    micro_batch=2,
    packing=True,
    tokens_per_pack=128,
    num_epochs=2,
    max_steps=3,
    eval_every_steps=100,
    checkpoint_every_steps=100,
)


@dataclass(frozen=True)
class Outcome:
    """What became of a family."""

    case: str
    engine: str
    """fused or general."""
    packing: str
    adapted: tuple[AdaptedWeights, ...]
    warnings: tuple[str, ...]
    num_changed: int
    num_kept: int
    unmoved: tuple[str, ...]
    largest_logit_difference: float


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def run_case(case: str, folder: Path) -> Outcome:
    """Take a tiny model of a family through training, merge and proof.

    Raises:
        ValueError: the family is refused, or a proof does not hold.
    """
    base_model = save_model(case, folder / "base")
    write_tokens(folder / "tokens", num_train=12, num_eval=2, shortest=20, longest=60)
    log = logging.getLogger("tasks.training.loop")
    handler, level = _Lines(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        outcome = train_adapter(base_model, folder / "tokens", folder / "run", CONFIG, seed=0, identity=case)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    plan = plan_merge(base_model, outcome.adapter)
    merged = folder / "merged"
    merged.mkdir()
    write_shards(plan, merged, 10**9)
    (merged / "config.json").write_bytes((base_model / "config.json").read_bytes())
    written = verify_tensors(plan, merged)
    check = check_merge(base_model, outcome.adapter, merged, _prompts(), MergeConfig(num_probes=4, probe_tokens=4))
    engine = next(line for line in handler.lines if line.startswith("Training with the ")).split()[3]
    return Outcome(
        case,
        engine,
        _name_packing(engine, outcome.warnings),
        outcome.adapted,
        outcome.warnings,
        written.num_changed,
        written.num_kept,
        written.unmoved,
        check.max_abs_logit_diff,
    )


def _name_packing(engine: str, notes: Sequence[str]) -> str:
    apart = any("side by side" in note for note in notes)
    return "padded side by side" if apart else "end to end"


def _prompts() -> list[list[int]]:
    return [[(7 * start + 3 * place) % (VOCABULARY - 10) + 5 for place in range(6)] for start in range(4)]
