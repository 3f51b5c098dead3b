"""Tiny models of many families through everything that a run does to a model, and the table that comes of it.

SFT_FAMILIES=all takes every family, and writes `docs/models.md` anew.
"""

import os
from pathlib import Path

import pytest

from flows.preflight import check_model
from schemas.config import TrainingConfig
from tasks.families.adaptation import CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTER
from tests.tasks.families import tiny
from tests.tasks.families.matrix import Outcome, run_case
from tests.tasks.families.shapes import SHAPES
from tests.tasks.families.table import TABLE, name_rows, read_engine, write_table
from tests.tasks.families.tiny import CASES, save_model

EVERYTHING = os.environ.get("SFT_FAMILIES") == "all"
# One of each kind: dense, with experts in each layout, recurrent, composite.
CHOSEN = (
    "qwen3",
    "gemma2",
    "phi3",
    "gpt2",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "laguna",
    "llama4",
    "hunyuan_v1_moe",
    "qwen3_5_moe",
    "nemotron_h",
    "falcon_h1",
    "mamba2",
    "lfm2_moe",
    "kimi_linear",
    "gemma3",
    "gemma4",
    "mistral3",
    "qwen3_vl_moe",
    "glm4v",
    "molmo2",
    "inkling_mm_model",
)
_outcomes: dict[str, Outcome] = {}


@pytest.mark.parametrize("case", CASES if EVERYTHING else CHOSEN)
def test_a_family_is_trained_merged_and_proven(case: str, tmp_path: Path) -> None:
    _outcomes[case] = outcome = run_case(case, tmp_path)
    check(outcome)
    if not EVERYTHING:
        assert outcome.engine == read_engine(TABLE.read_text(encoding="utf-8"), case)


@pytest.mark.parametrize("shape", SHAPES if EVERYTHING else ("gemma4_values_are_keys", "phi3_longrope"))
def test_an_unusual_shape_is_trained_merged_and_proven(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.SETTINGS, shape, SHAPES[shape])
    check_model(save_model(shape, tmp_path / "base"), TrainingConfig())
    check(run_case(shape, tmp_path))


def test_experts_whose_rows_are_not_on_16_bytes_are_trained_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's grouped products refuse them."""
    monkeypatch.setitem(tiny.SETTINGS, "qwen3_moe_of_22", SHAPES["qwen3_moe_of_22"])
    outcome = run_case("qwen3_moe_of_22", tmp_path)
    check(outcome)
    assert outcome.engine == "general"
    assert "its experts' gate_up_proj has 44 rows or columns, which is no multiple of 8" in " ".join(outcome.warnings)


def check(outcome: Outcome) -> None:
    kinds = {row.kind: row for row in outcome.adapted}
    for left_alone in (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS):
        if left_alone in kinds:
            assert kinds[left_alone].num_adapted == 0
    for kind, row in kinds.items():
        if kind not in (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS):
            # Every weight is adapted, or it is said which is not and why.
            assert row.num_adapted == row.num_weights or row.skipped, kind
    assert sum(row.num_adapted for row in outcome.adapted) > 0
    # Of an expert that no token chose, which the run says, nothing can move.
    still = [warning for warning in outcome.warnings if "did not move" in warning]
    assert not [warning for warning in still if "no token was routed to these experts" not in warning]
    assert (outcome.num_changed > 0, outcome.num_kept > 0, outcome.unmoved) == (True, True, ())
    assert outcome.largest_logit_difference < 1e-3


def test_the_table_has_every_family() -> None:
    if EVERYTHING and len(_outcomes) == len(CASES):
        write_table(_outcomes)
    assert name_rows(TABLE.read_text(encoding="utf-8")) == sorted(CASES)
