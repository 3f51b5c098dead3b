import math
import pickle
from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from schemas.config import EvaluationConfig
from tasks.evaluation.comparison import ComparisonError, compare
from tasks.evaluation.paired import tail_probability


def make_rows(
    exact: Sequence[float],
    *,
    nll: Sequence[float] | NDArray[np.float64] | None = None,
    tokens: Sequence[int] | None = None,
    chrf: Sequence[float] | None = None,
    ids: Sequence[str] | None = None,
) -> pl.DataFrame:
    """Make evaluation rows; nll is a token, rouge_l follows exact."""
    count = len(exact)
    num_tokens = list(tokens or [10] * count)
    nll_means = [1.0] * count if nll is None else [float(value) for value in nll]
    return pl.DataFrame(
        {
            "example_id": list(ids or [f"{at:016x}" for at in range(count)]),
            "question": [f"question {at}" for at in range(count)],
            "reference": ["yes"] * count,
            "answer": ["yes" if right else "no" for right in exact],
            "nll_sum": [a * b for a, b in zip(nll_means, num_tokens, strict=True)],
            "num_tokens": num_tokens,
            "exact_match": [float(right) for right in exact],
            "rouge_l": [float(right) for right in exact],
            "chrf": list(chrf or [100.0 * right for right in exact]),
            "repetition_rate": [0.0] * count,
            "empty_answers": [0.0] * count,
            "answer_tokens": [1] * count,
        }
    )


CONFIG = EvaluationConfig(num_resamples=2000)


def test_values_and_differences_of_two_rows() -> None:
    # nll a token over all tokens: (2 * 1 + 1 * 3) / 4 before, (1 * 1 + 0 * 3) / 4 after.
    before = make_rows([0, 1], nll=[2.0, 1.0], tokens=[1, 3])
    after = make_rows([1, 1], nll=[1.0, 0.0], tokens=[1, 3])
    comparison = compare(before, after, CONFIG, seed=0)
    assert comparison.num_examples == 2
    assert (comparison.before["nll"], comparison.after["nll"]) == (1.25, 0.25)
    assert comparison.before["perplexity"] == pytest.approx(math.exp(1.25))
    assert (comparison.before["exact_match"], comparison.after["exact_match"]) == (0.5, 1.0)
    assert comparison.delta["nll"].value == -1.0
    assert comparison.delta["perplexity"].value == pytest.approx(math.exp(0.25) - math.exp(1.25))
    assert comparison.delta["exact_match"].value == 0.5
    # Resamples are both first, one of each, or both second: differences of 1, 0.5 and 0.
    assert (comparison.delta["exact_match"].ci_low, comparison.delta["exact_match"].ci_high) == (0.0, 1.0)
    # Every row gains exactly 1 nat a token.
    assert comparison.delta["nll"].ci_low == pytest.approx(-1.0)
    assert comparison.delta["nll"].ci_high == pytest.approx(-1.0)


def test_what_makes_rows_hard_for_both_does_not_widen_the_difference() -> None:
    hardness = np.linspace(0.5, 8.0, 60)
    before, after = make_rows([0] * 60, nll=hardness), make_rows([0] * 60, nll=hardness - 0.25)
    comparison = compare(before, after, CONFIG, seed=0)
    low, high = comparison.before_interval["nll"]
    assert high - low > 0.8
    assert comparison.delta["nll"].ci_low == pytest.approx(-0.25)
    assert comparison.delta["nll"].ci_high == pytest.approx(-0.25)


def test_a_large_interval_is_that_of_the_normal_distribution() -> None:
    # 100 of 400 rows become right: mean 0.25, deviation sqrt(0.25 * 0.75), error 0.02165 of the mean.
    before, after = make_rows([0] * 400), make_rows([1] * 100 + [0] * 300)
    delta = compare(before, after, EvaluationConfig(num_resamples=20_000), seed=1).delta["exact_match"]
    assert delta.value == 0.25
    assert delta.ci_low == pytest.approx(0.25 - 1.96 * 0.02165, abs=0.003)
    assert delta.ci_high == pytest.approx(0.25 + 1.96 * 0.02165, abs=0.003)
    narrow = compare(before, after, EvaluationConfig(num_resamples=20_000, confidence=0.8), seed=1).delta["exact_match"]
    assert narrow.ci_high - narrow.ci_low == pytest.approx(2 * 1.282 * 0.02165, abs=0.005)


@pytest.mark.parametrize("num_rows", [12, 60])
def test_the_interval_covers_the_truth_as_often_as_it_says(num_rows: int) -> None:
    # Rows differ by 2 nats, gains by 0.5: an interval that forgets the pairs is four times too wide and always covers.
    source = np.random.default_rng(5)
    config, num_trials, truth = EvaluationConfig(num_resamples=400, confidence=0.9), 250, -0.5
    covered = 0
    for trial in range(num_trials):
        hardness = source.gamma(4.0, 1.0, num_rows)
        gain = source.normal(truth, 0.5, num_rows)
        before, after = make_rows([0] * num_rows, nll=hardness + 3), make_rows([0] * num_rows, nll=hardness + 3 + gain)
        delta = compare(before, after, config, seed=trial).delta["nll"]
        covered += delta.ci_low <= truth <= delta.ci_high
    # 0.9, three standard errors of 250 trials (sqrt(0.9 * 0.1 / 250) = 0.019), and 0.01 for the bootstrap itself.
    assert 0.833 < covered / num_trials < 0.967


def test_examples_of_one_conversation_count_as_one() -> None:
    exact = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1]
    twice = [value for value in exact for _ in range(2)]
    ids = [f"{at:016x}" for at in range(10) for _ in range(2)]
    single = compare(make_rows([0] * 10), make_rows(exact), CONFIG, seed=3).delta["exact_match"]
    double = compare(make_rows([0] * 20, ids=ids), make_rows(twice, ids=ids), CONFIG, seed=3).delta["exact_match"]
    assert double == single


def test_one_conversation_is_never_beyond_chance() -> None:
    delta = compare(make_rows([0], nll=[3.0]), make_rows([1], nll=[1.0]), CONFIG, seed=0).delta
    assert (delta["exact_match"].ci_low, delta["exact_match"].ci_high) == (0.0, 1.0)
    assert (delta["nll"].ci_low, delta["nll"].ci_high) == (-2.0, 0.0)


def test_the_tail_is_the_nominal_one_for_many_rows_and_smaller_for_few() -> None:
    assert tail_probability(0.95, 1_000_000) == pytest.approx(0.025, rel=1e-4)
    # Student's t with 9 degrees of freedom is 2.262 at 0.975; Phi(-sqrt(10 / 9) * 2.262) = 0.00855.
    assert tail_probability(0.95, 10) == pytest.approx(0.00855, rel=0.01)
    assert tail_probability(0.95, 1) is None


def test_the_seed_decides() -> None:
    before, after = make_rows([0] * 30), make_rows([1, 0, 0] * 10, nll=np.linspace(0.1, 2.0, 30))
    first = compare(before, after, CONFIG, seed=1).delta
    assert compare(before, after, CONFIG, seed=1).delta == first
    assert compare(before, after, CONFIG, seed=2).delta != first


def test_resampling_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = make_rows([0] * 30), make_rows([1, 0, 0] * 10)
    whole = compare(before, after, CONFIG, seed=1).delta
    monkeypatch.setattr("tasks.evaluation.paired.BLOCK", 30 * 7)
    assert compare(before, after, CONFIG, seed=1).delta == whole


def test_rows_must_be_the_same_in_the_same_order() -> None:
    before = make_rows([0, 1, 1])
    with pytest.raises(ComparisonError, match="3 rows before and 2 after"):
        compare(before, before.head(2), CONFIG, seed=0)
    with pytest.raises(ComparisonError, match=r"row 2: example_id is 0+1 before and 0+2 after \(2 of 3 rows differ\)"):
        compare(before, before[[0, 2, 1]], CONFIG, seed=0)
    with pytest.raises(ComparisonError, match="row 1: num_tokens is 10 before and 11 after"):
        compare(before, make_rows([0, 1, 1], tokens=[11, 10, 10]), CONFIG, seed=0)
    with pytest.raises(ComparisonError, match="at least one"):
        compare(before.clear(), before.clear(), CONFIG, seed=0)
    error = pickle.loads(pickle.dumps(ComparisonError("where, value, limit")))
    assert str(error) == "where, value, limit"


def test_outcomes_go_by_exact_match_and_then_by_chrf() -> None:
    before = make_rows([0, 1, 0, 0, 0, 1], chrf=[99.5, 100.0, 50.0, 50.0, 50.0, 100.0])
    after = make_rows([1, 0, 0, 0, 0, 1], chrf=[100.0, 99.5, 51.5, 48.5, 50.9, 100.0])
    table = compare(before, after, CONFIG, seed=0).table
    assert table["outcome"].to_list() == ["improved", "worsened", "improved", "worsened", "unchanged", "unchanged"]
    assert table["answer_before"].to_list() == ["no", "yes", "no", "no", "no", "yes"]
    assert table["chrf_after"].to_list() == [100.0, 99.5, 51.5, 48.5, 50.9, 100.0]
    assert table["nll_before"].to_list() == [1.0] * 6


def test_an_exact_match_goes_before_chrf_and_the_tolerance_itself_changes_nothing() -> None:
    before = make_rows([1, 0, 0, 0], chrf=[50.0, 90.0, 50.0, 50.0])
    after = make_rows([0, 1, 0, 0], chrf=[90.0, 50.0, 51.0, 49.0])
    table = compare(before, after, CONFIG, seed=0).table
    assert table["outcome"].to_list() == ["worsened", "improved", "unchanged", "unchanged"]
