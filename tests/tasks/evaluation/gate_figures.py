"""The figures of docs/gate.md, made by simulation: `python -m tests.tasks.evaluation.gate_figures` writes them anew."""

import re
from pathlib import Path
from typing import Any

from schemas.config import GateConfig
from tests.tasks.evaluation.simulation import simulate

PAGE = Path(__file__).resolve().parents[3] / "docs" / "gate.md"
NUM_DRAWS = 1000
SEED = 11
SIZES = (30, 50, 100, 200, 500)
EXACT_GAINS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
NLL_GAINS = (0.0, 0.02, 0.05, 0.1, 0.15)


def promote_exact(num_conversations: int, gain: float, num_draws: int = NUM_DRAWS) -> float:
    """Return how often more exact matches become a champion, with the default guards."""
    return simulate(num_conversations, num_draws, GateConfig(metric="exact_match"), SEED, exact_gain=gain)


def promote_nll(num_conversations: int, gain: float, num_draws: int = NUM_DRAWS) -> float:
    """Return how often a lower nll on free text becomes a champion, with the default guards."""
    return simulate(num_conversations, num_draws, GateConfig(metric="nll"), SEED, nll_gain=gain, is_free_text=True)


TABLES: dict[str, tuple[str, tuple[float, ...], Any]] = {
    "exact_match": ("+{:.0f} points", EXACT_GAINS, promote_exact),
    "nll": ("{:.0f} % lower", NLL_GAINS, promote_nll),
}


def write_table(name: str) -> str:
    """Return a table of the promoted share by held-out conversations and gain."""
    head, gains, promote = TABLES[name]
    titles = [head.format(100 * gain) if gain else "equal" for gain in gains]
    lines = [f"| held-out conversations | {' | '.join(titles)} |"]
    lines.append("| ---: |" + " ---: |" * len(gains))
    for size in SIZES:
        lines.append(f"| {size} | " + " | ".join(f"{promote(size, gain):.1%}" for gain in gains) + " |")
    return "\n".join(lines)


def place_table(page: str, name: str, table: str) -> str:
    """Put a table between its marks in the page."""
    begin, end = f"<!-- {name}: simulated -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(page), f"{begin} is missing"
    return pattern.sub(lambda _: f"{begin}\n\n{table}\n\n{end}", page)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for each in TABLES:
        text = place_table(text, each, write_table(each))
    PAGE.write_text(text, encoding="utf-8")
