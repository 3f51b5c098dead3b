"""The new version meets the champion on rows that neither was trained on, and the page shows all three."""

from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest

from schemas.config import EvaluationConfig
from tasks.evaluation.champion import Rival, add_answers, compare_with_champion, incomparable
from tasks.evaluation.comparison import ComparisonError, compare
from tasks.evaluation.report import describe_metric, write_report
from tasks.evaluation.verdict import describe_rival
from tests.tasks.evaluation.test_report import HOSTILE, make_rows, read_page

CONFIG = EvaluationConfig(num_resamples=500)


def _compare_with(champion: Sequence[int], new: Sequence[int], seen: Sequence[int] = (), *, nll: float = 1.0) -> Rival:
    ids = [f"{number:016x}" for number in seen]
    return compare_with_champion("4", make_rows(champion, nll=2.0), make_rows(new, nll=nll), ids, CONFIG, seed=0)


def test_rows_that_the_champion_was_trained_on_are_left_out_and_counted() -> None:
    # It knows the first ten by heart; on the other thirty it knows nothing.
    rival = _compare_with([1] * 10 + [0] * 30, [0] * 10 + [1] * 30, seen=range(10))
    assert (rival.report.num_examples, rival.report.num_seen) == (30, 10)
    assert rival.report.metrics["exact_match"] == 0.0
    assert rival.report.delta["exact_match"].value == 1.0
    assert rival.report.notes == ("10 of 40 held-out rows are left out: the champion was trained on them",)


def test_without_an_unseen_row_nothing_is_compared() -> None:
    rival = _compare_with([1, 1], [1, 1], seen=(0, 1))
    assert rival.comparison is None
    assert (rival.report.num_examples, rival.report.num_seen) == (0, 2)
    assert "no held-out row is new to it" in describe_rival(rival)


def test_other_rows_are_refused() -> None:
    with pytest.raises(ComparisonError, match="40 rows before and 39 after"):
        compare_with_champion("4", make_rows([0] * 40), make_rows([0] * 39), (), CONFIG, seed=0)


def test_the_sentence_says_which_is_better_on_how_many_rows() -> None:
    assert describe_rival(_compare_with([0] * 40, [1] * 30 + [0] * 10)).startswith(
        "Against the champion (version 4), on 40 held-out rows: it is better in word-for-word right, "
    )
    worse = describe_rival(_compare_with([1] * 30 + [0] * 10, [0] * 40, nll=3.0))
    assert "it is worse in word-for-word right" in worse
    mixed = describe_rival(_compare_with([0] * 40, [1] * 30 + [0] * 10, nll=3.0))
    assert "but worse in surprise (nll)" in mixed
    assert "there is no clear difference" in describe_rival(_compare_with([0, 1] * 20, [1, 0] * 20, nll=2.0))


def test_the_page_shows_base_champion_and_new_version_side_by_side(tmp_path: Path) -> None:
    base, new = make_rows([0] * 40, nll=4.0), make_rows([1] * 30 + [0] * 10)
    champion = make_rows([1] * 20 + [0] * 20, nll=2.0, answers=["yes"] * 20 + [HOSTILE] * 20)
    rival = compare_with_champion("4", champion, new, (), CONFIG, seed=0)
    page = write_report(tmp_path, compare(base, new, CONFIG, seed=0), title="t", rival=rival)
    reader = read_page(page)
    assert reader.open == []
    assert "script" not in reader.tags
    for words in ("Champion", "(version 4)", "Change", "over champion", "+25.0 points", HOSTILE):
        assert words in reader.text
    metric = describe_metric(compare(base, new, CONFIG, seed=0), "exact_match", rival)
    assert (metric.before, metric.champion, metric.after) == ("0.0 %", "50.0 %", "75.0 %")
    assert (metric.change, metric.champion_change) == ("+75.0 points", "+25.0 points")


def test_the_page_says_why_a_champion_was_not_compared(tmp_path: Path) -> None:
    comparison = compare(make_rows([0] * 40), make_rows([1] * 40), CONFIG, seed=0)
    rival = incomparable("4", ("it has another tokenizer",))
    text = read_page(write_report(tmp_path, comparison, title="t", rival=rival)).text
    assert "It could not be compared with the champion (version 4): it has another tokenizer." in text
    assert "over champion" not in text


def test_the_table_gets_the_champions_answers() -> None:
    table = compare(make_rows([0, 1]), make_rows([1, 1]), CONFIG, seed=0).table
    added = add_answers(table, _compare_with([1, 0], [1, 1], seen=(0,)))
    assert added["answer_champion"].to_list() == ["yes", "no"]
    assert added["nll_champion"].to_list() == [2.0, 2.0]
    assert add_answers(table, None).columns == table.columns
    assert isinstance(added, pl.DataFrame)
