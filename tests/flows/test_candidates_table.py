"""The terminal's table of a sweep's candidates names all of them, the best one first."""

import io

from rich.console import Console

from flows.terminal import make_candidates_table
from schemas.artifacts import CandidateReport, SweepReport


def test_candidates_stand_by_their_loss_and_those_given_up_last_with_the_reason() -> None:
    lost = CandidateReport(name="c", learning_rate=0.9, rank=4, seed=1, loss=None, failure="step 17: loss [nan]")
    candidates = (
        lost,
        CandidateReport(name="a", learning_rate=1e-4, rank=16, seed=0, loss=3.38),
        CandidateReport(name="b", learning_rate=1e-3, rank=4, seed=0, loss=3.18),
    )
    console = Console(width=100, file=(written := io.StringIO()))
    console.print(make_candidates_table(SweepReport(winner="b", loss=3.18, corrected_loss=3.2, candidates=candidates)))
    lines = [line.replace("│", "").split() for line in written.getvalue().splitlines() if line.startswith("│")]
    assert lines == [
        ["0.001", "4", "0", "3.1800"],
        ["0.0001", "16", "0", "3.3800"],
        ["0.9", "4", "1", "given", "up,", "step", "17:", "loss", "[nan]"],
    ]
