"""How often the gate is wrong, by simulation: equal models pass by chance only, others as docs/gate.md says."""

import numpy as np
import polars as pl
import pytest

from schemas.config import EvaluationConfig, GateConfig
from tasks.evaluation.comparison import compare
from tests.tasks.evaluation.gate_figures import NUM_DRAWS, PAGE, SEED, SIZES, TABLES
from tests.tasks.evaluation.simulation import NAMES, Results, draw_results, measure_deltas, simulate

_NO_GUARDS: dict[str, float | None] = {"repetition_rate": None, "empty_answers": None, "chrf": None}
_ALL = {"metric": NAMES[0], "further_metrics": NAMES[1:]}


@pytest.mark.parametrize("num_conversations", [30, 120])
@pytest.mark.parametrize(
    "settings",
    [{"metric": "nll"}, {"metric": "exact_match"}, {"metric": "chrf"}, {"metric": "nll", "guards": {}}, _ALL],
    ids=["nll", "exact_match", "chrf", "nll with guards", "any of five metrics"],
)
def test_a_model_equal_to_its_base_is_promoted_in_at_most_one_of_twenty_draws(
    num_conversations: int, settings: dict[str, object]
) -> None:
    gate = GateConfig.model_validate({"guards": _NO_GUARDS, **settings})
    # Level 0.05 on both sides of zero: 0.025 would pass by chance; 0.0035 is its standard error over 2,000 draws.
    assert simulate(num_conversations, 2000, gate, seed=3) <= 0.05


def test_the_figures_of_the_page_are_those_of_the_simulation() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, (_, gains, promote) in TABLES.items():
        table = page.split(f"<!-- {name}: simulated -->")[1].split("<!--")[0]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n") if line.startswith("|")]
        assert [int(row[0]) for row in rows[2:]] == list(SIZES)
        for size, column in ((SIZES[0], 0), (SIZES[1], len(gains) - 1)):
            assert rows[2 + SIZES.index(size)][1 + column] == f"{promote(size, gains[column]):.1%}"


def test_what_the_guards_cost_on_few_conversations_is_as_the_page_says() -> None:
    for guards, words in (({"chrf": None}, "32.5 % without the one on chrF"), (_NO_GUARDS, "40.0 % without any")):
        gate = GateConfig.model_validate({"metric": "nll", "guards": guards})
        rate = simulate(30, NUM_DRAWS, gate, SEED, nll_gain=0.15, is_free_text=True)
        assert f"{100 * rate:.1f} % {words[7:]}" == words
        assert words in PAGE.read_text(encoding="utf-8")


def _write_rows(results: Results, side: str, draw: int) -> pl.DataFrame:
    columns = results.before if side == "before" else results.after
    count = len(results.num_tokens)
    return pl.DataFrame(
        {
            "example_id": [f"{at:016x}" for at in range(count)],
            "question": [""] * count,
            "reference": [""] * count,
            "answer": [""] * count,
            "nll_sum": columns["nll"][:, draw],
            "num_tokens": results.num_tokens.astype(np.int64),
            **{name: columns[name][:, draw] for name in NAMES if name != "nll"},
            "rouge_l": [0.0] * count,
            "answer_tokens": [1.0] * count,
        }
    )


def test_the_simulation_compares_as_a_run_does() -> None:
    gate = GateConfig(metric="nll", further_metrics=("exact_match",))
    results = draw_results(40, 3, np.random.default_rng(1), nll_gain=0.1)
    deltas = measure_deltas(results, gate, np.random.default_rng(9), num_resamples=300)
    for draw in range(3):
        rows = [_write_rows(results, side, draw) for side in ("before", "after")]
        delta = compare(rows[0], rows[1], EvaluationConfig(num_resamples=300), seed=9, judged=gate.metrics).delta
        for name in NAMES:
            simulated = deltas[draw][name]
            assert simulated.value == pytest.approx(delta[name].value)
            assert (simulated.ci_low, simulated.ci_high) == pytest.approx((delta[name].ci_low, delta[name].ci_high))
            if name in gate.metrics:
                assert simulated.p_value == delta[name].p_value
