"""The figures of docs/gate.md, by simulation: `python -m tests.tasks.evaluation.gate_figures` makes them anew."""

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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

_AXES = {"exact_match": "exact_match gained (points)", "nll": "nll lower by (%)"}


def find_rates(name: str) -> dict[int, list[float]]:
    """Return the promoted share of each gain, by held-out conversations."""
    _, gains, promote = TABLES[name]
    return {size: [promote(size, gain) for gain in gains] for size in SIZES}


def write_table(name: str, rates: dict[int, list[float]]) -> str:
    """Return a table of the promoted share by held-out conversations and gain."""
    head, gains, _ = TABLES[name]
    titles = [head.format(100 * gain) if gain else "equal" for gain in gains]
    lines = [f"| held-out conversations | {' | '.join(titles)} |", "| ---: |" + " ---: |" * len(gains)]
    lines += [f"| {size} | {' | '.join(f'{rate:.1%}' for rate in shares)} |" for size, shares in rates.items()]
    return "\n".join(lines)


def draw_curves(found: dict[str, dict[int, list[float]]]) -> None:
    """Draw the promoted share over the gain, a curve for each number of held-out conversations."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, rates) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for number, (size, shares) in enumerate(rates.items()):
            gains = [100 * gain for gain in TABLES[name][1]]
            axes.plot(gains, shares, marker="o", markersize=3, color=str(0.75 - 0.18 * number), label=f"{size}")
        axes.axhline(0.05, linewidth=0.8, linestyle=(0, (4, 3)), color="#b3261e")
        axes.set_xlabel(_AXES[name])
        axes.set_ylim(0, 1.02)
    figure.axes[0].set_ylabel("share promoted")
    figure.axes[0].legend(title="conversations", frameon=False)
    figure.savefig(PAGE.with_name("gate-power.png"), dpi=110, facecolor="white")


def place_table(page: str, name: str, table: str) -> str:
    """Put a table between its marks in the page."""
    begin, end = f"<!-- {name}: simulated -->", f"<!-- {name}: end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(page), f"{begin} is missing"
    return pattern.sub(lambda _: f"{begin}\n\n{table}\n\n{end}", page)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    everything = {each: find_rates(each) for each in TABLES}
    for each, shares_by_size in everything.items():
        text = place_table(text, each, write_table(each, shares_by_size))
    PAGE.write_text(text, encoding="utf-8")
    draw_curves(everything)
