"""Tiny models of many families through everything that a run does to a model, and the table that comes of it.

SFT_FAMILIES=all takes every family, and writes `docs/models.md` anew.
"""

import os
from pathlib import Path

import pytest

from tasks.families.adaptation import CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTER
from tests.tasks.families.matrix import Outcome, run_case
from tests.tasks.families.table import TABLE, name_rows, write_table
from tests.tasks.families.tiny import CASES

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
)
_outcomes: dict[str, Outcome] = {}


@pytest.mark.parametrize("case", CASES if EVERYTHING else CHOSEN)
def test_a_family_is_trained_merged_and_proven(case: str, tmp_path: Path) -> None:
    outcome = run_case(case, tmp_path)
    _outcomes[case] = outcome
    kinds = {row.kind: row for row in outcome.adapted}
    for left_alone in (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS):
        if left_alone in kinds:
            assert kinds[left_alone].num_adapted == 0
    for kind, row in kinds.items():
        if kind not in (ROUTER, HEAD, EMBEDDINGS, OUTSIDE, CONVOLUTIONS):
            # Every weight is adapted, or it is said which is not and why.
            assert row.num_adapted == row.num_weights or row.skipped, kind
    assert sum(row.num_adapted for row in outcome.adapted) > 0
    assert not [warning for warning in outcome.warnings if "did not move" in warning]
    assert (outcome.num_changed > 0, outcome.num_kept > 0, outcome.unmoved) == (True, True, ())
    assert outcome.largest_logit_difference < 1e-3


def test_the_table_has_every_family() -> None:
    if EVERYTHING and len(_outcomes) == len(CASES):
        write_table(_outcomes)
    assert name_rows(TABLE.read_text(encoding="utf-8")) == sorted(CASES)
