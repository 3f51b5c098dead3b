"""A metric is one row of one table: whoever adds it there has it in rows, comparison, gate, report and MLflow."""

import math
from pathlib import Path

import polars as pl
import pytest

from schemas.config import JUDGED_METRICS, EvaluationConfig, GateConfig, RunConfig
from tasks.evaluation.comparison import compare
from tasks.evaluation.gate import check_settings, judge
from tasks.evaluation.metrics import METRICS, Metric, MetricError, average_rows, check_metrics, is_derived
from tasks.evaluation.report import write_report
from tasks.evaluation.scoring import HeldOut, score_rows
from tests.tasks.evaluation.conftest import WORDS


def _score(tokenizer: object, answers: list[list[int]], nll: float) -> pl.DataFrame:
    held_out = [HeldOut(f"{at:016x}", f"q {at}", "i am red", [5], [9, 10, 11, 4]) for at in range(len(answers))]
    return score_rows(held_out, answers, [nll] * len(answers), tokenizer)  # type: ignore[arg-type]


def test_a_metric_from_outside_is_a_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokenizer: object
) -> None:
    metric = Metric(
        label="Says red",
        meaning="Answers with the word red.",
        form="percent",
        direction="higher",
        measure=lambda row: float("red" in row.answer.split()),
        bounds=(0, 1),
        guard_margin=0.2,
    )
    monkeypatch.setitem(METRICS, "says_red", metric)
    red, blue = WORDS.index("red"), WORDS.index("blue")
    before, after = _score(tokenizer, [[9, 10, blue]] * 40, 8.0), _score(tokenizer, [[9, 10, red]] * 40, 4.0)
    comparison = compare(before, after, EvaluationConfig(num_resamples=100), seed=0, judged=("says_red",))
    assert (comparison.before["says_red"], comparison.after["says_red"]) == (0.0, 1.0)
    gate = GateConfig(metric="says_red", min_gain=0.5)
    check_settings(gate)
    assert judge(comparison.delta, gate, num_conversations=40).reasons[0].startswith("says_red gained 1 over")
    back = compare(after, before, EvaluationConfig(num_resamples=100), seed=0)
    refused = judge(back.delta, GateConfig(metric="chrf", guards={"chrf": None}), num_conversations=40)
    assert any(reason.startswith("says_red against the base model") for reason in refused.reasons)
    assert "Says red" in write_report(tmp_path, comparison, title="t").read_text()


def test_looping_answers_do_not_pass_for_a_better_nll(tokenizer: object) -> None:
    # Four rows of sixty become wrong and none right; the others were wrong before.
    good, loop = [9, 10, 11], [11] * 24
    before = _score(tokenizer, [good] * 4 + [[9, 10, 12]] * 56, 8.0)
    after = _score(tokenizer, [loop] * 60, 4.0)
    comparison = compare(before, after, EvaluationConfig(num_resamples=500), seed=0, judged=("nll",))
    assert METRICS["nll"].gain(comparison.delta["nll"].value) > 0
    decision = judge(comparison.delta, GateConfig(metric="nll"), num_conversations=comparison.num_conversations)
    assert decision.verdict == "refused"
    assert [reason.split()[0] for reason in decision.reasons] == ["chrf", "repetition_rate"]
    without = GateConfig(metric="nll", guards={"chrf": None, "repetition_rate": None, "empty_answers": None})
    assert judge(comparison.delta, without, num_conversations=60).verdict == "promoted"


def test_means_are_over_rows_or_over_tokens(tokenizer: object) -> None:
    rows = _score(tokenizer, [[9, 10, 11], [], [12]], 2.0)
    means = average_rows(rows)
    assert means["exact_match"] == pytest.approx(1 / 3)
    assert means["empty_answers"] == pytest.approx(1 / 3)
    assert means["nll"] == pytest.approx(3 * 2.0 / 12)
    assert means["perplexity"] == pytest.approx(math.exp(0.5))
    assert means["answer_tokens"] == pytest.approx(4 / 3)


def test_a_row_out_of_a_metrics_bounds_is_an_error(monkeypatch: pytest.MonkeyPatch, tokenizer: object) -> None:
    broken = Metric("x", "x", "percent", "higher", measure=lambda row: 2.0, bounds=(0, 1))
    monkeypatch.setitem(METRICS, "broken", broken)
    with pytest.raises(Exception, match="broken"):
        _score(tokenizer, [[9]], 1.0)


def test_perplexity_says_what_nll_says() -> None:
    assert [name for name in METRICS if is_derived(name)] == ["perplexity"]


def test_forms_offer_the_metrics_of_the_table_of_which_one_side_is_better() -> None:
    assert list(JUDGED_METRICS) == [name for name, metric in METRICS.items() if metric.direction != "neither"]
    schema = RunConfig.model_json_schema()["$defs"]
    assert schema["GateConfig"]["properties"]["metric"]["enum"] == [*JUDGED_METRICS]
    assert schema["GateConfig"]["properties"]["further_metrics"]["items"]["enum"] == [*JUDGED_METRICS]
    assert schema["ProbeConfig"]["properties"]["metric"]["enum"] == [*JUDGED_METRICS]


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(MetricError, match=r"here = 'vibes': no such metric to judge by; known are exact_match, "):
        check_metrics(["vibes"], "here")
