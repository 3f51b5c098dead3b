"""No row vanishes between ingestion and tokenization."""

from typing import Any

import pytest

from flows.accounting import account_rows, check_rejected, describe_rows, describe_run
from flows.attempts import _differences, _digest_config
from flows.rejected import judge_rejected
from schemas.artifacts import DatasetRef, TokensRef
from schemas.config import DataConfig
from schemas.loading import parse_config
from tests.flows.test_form import make


def _dataset(rows_in: int) -> DatasetRef:
    return DatasetRef(
        uri="runs:/x",
        digest="d" * 64,
        source_digest="s" * 64,
        rows_in=rows_in,
        rows_train=90,
        rows_eval=10,
        rows_rejected={"empty_answer": 2},
        rows_duplicate=5,
        rows_leaked=1,
    )


_TOKENS = TokensRef(
    uri="runs:/y",
    digest="t" * 64,
    rows_train=88,
    rows_eval=9,
    num_examples=100,
    num_eval_examples=9,
    trained_tokens=500,
    total_tokens=1000,
    rows_rejected={"answer_too_long": 3},
    template_digest="p" * 64,
)


def test_rejects_of_both_stages_are_counted_by_reason() -> None:
    report = account_rows(_dataset(108), _TOKENS)
    assert report.rows_rejected == {"empty_answer": 2, "answer_too_long": 3}
    assert (report.rows_train, report.rows_eval) == (88, 9)


def test_a_vanished_row_stops_the_run() -> None:
    with pytest.raises(AssertionError, match="rows vanished: 109 came in, 108 are accounted for"):
        account_rows(_dataset(109), _TOKENS)


def test_one_line_says_where_every_row_went() -> None:
    assert describe_rows(_dataset(108), _TOKENS) == (
        "108 rows in = 88 trained + 9 evaluated + 5 rejected (answer_too_long 3, empty_answer 2) + 5 duplicates + "
        "1 leaked"
    )


def test_warnings_of_both_stages_are_in_the_report() -> None:
    dataset = _dataset(108).model_copy(update={"warnings": ("near",)})
    tokens = _TOKENS.model_copy(update={"warnings": ("lost",)})
    assert account_rows(dataset, tokens).warnings == ("near", "lost")


def test_rejects_of_both_stages_have_one_budget() -> None:
    assert judge_rejected({"empty_answer": 1, "template_error": 1}, 200, 0.01, ()) is None
    problem = judge_rejected({"empty_answer": 1, "template_error": 2}, 200, 0.01, ())
    assert problem is not None
    assert "3 of 200 rows (1.50%) are rejected, and data.max_rejected_fraction allows 1.00%" in problem
    check_rejected(DataConfig(source="x", max_rejected_fraction=0.05), _dataset(108), _TOKENS)


def test_held_out_rows_that_are_all_rejected_stop_the_run_that_wanted_some() -> None:
    tokens = _TOKENS.model_copy(update={"rows_eval": 0, "num_eval_examples": 0})
    wide = {"source": "x", "max_rejected_fraction": 0.5}
    with pytest.raises(ValueError, match=r"x: none of the 10 held-out rows became an example \(answer_too_long 3\)"):
        check_rejected(DataConfig.model_validate(wide), _dataset(108), tokens)
    check_rejected(DataConfig.model_validate({**wide, "eval_fraction": 0}), _dataset(108), tokens)


def test_a_run_is_named_by_what_model_and_dataset() -> None:
    config = parse_config({"name": "n", "model": {"base_model": "Qwen/Q-1B"}, "data": {"source": "a/rows.jsonl"}})
    assert describe_run(config).startswith("n: Q-1B on rows, 20")
    entries = config.model_copy(update={"data": DataConfig(source="data/dataset_info.json#identity,support")})
    assert describe_run(entries).startswith("n: Q-1B on identity,support, 20")


def test_differences_name_each_setting_with_both_values() -> None:
    before = {"seed": 1, "training": {"rank": 4, "alpha": 8.0}}
    now = {"seed": 1, "training": {"rank": 8, "alpha": 8.0}, "name": "x"}
    assert _differences(before, now) == ["name: None -> 'x'", "training.rank: 4 -> 8"]


def test_a_run_may_go_on_with_another_number_of_gpus_and_with_no_other_setting() -> None:
    def digest(**training: Any) -> str:
        return _digest_config(make(training=training))

    assert digest(num_processes=2, strategy="fsdp") == digest(num_processes="auto") == digest()
    assert digest(rank=32) != digest()
