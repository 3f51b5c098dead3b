"""The door of registration around the gate: may the champion be asked, may its place be taken."""

from pathlib import Path

import pytest

from schemas.artifacts import ChampionReport, Decision, EvalReport, GateCheck, TokensRef
from tasks import storage
from tasks.registry import promotion, task, versions
from tests.tasks.registry.conftest import MakeVersion

_COMPARED_WITH_1 = ChampionReport(version="1", num_examples=40, num_seen=0, metrics={}, delta={}, notes=())
_PROMOTED = Decision(verdict="promoted", checks=(GateCheck(kind="gain", passed=True, finding="it is better"),))
_REFUSED = Decision(verdict="refused", checks=(GateCheck(kind="gain", passed=False, finding="it is worse"),))


@pytest.fixture
def tokens(tmp_path: Path) -> TokensRef:
    """Tokens of a run whose tokenizer is one file."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return TokensRef(
        uri=str(tmp_path),
        digest=storage.digest_folder(tmp_path),
        rows_train=1,
        rows_eval=1,
        num_examples=1,
        num_eval_examples=1,
        trained_tokens=1,
        total_tokens=1,
        rows_rejected={},
        template_digest="chatml",
    )


def test_a_champion_is_asked_only_rows_in_its_own_tokens_and_template(tokens: TokensRef, tmp_path: Path) -> None:
    own = storage.digest_file(tmp_path / "tokenizer" / "tokenizer.json")
    tags = {"sft.model_digest": "m", "sft.tokenizer_digest": own, "sft.template_digest": "chatml"}
    assert task._find_obstacle(tags, tokens) is None
    assert "another chat template" in str(task._find_obstacle({**tags, "sft.template_digest": "other"}, tokens))
    assert "another tokenizer" in str(task._find_obstacle({**tags, "sft.tokenizer_digest": "other"}, tokens))
    assert "was not registered by this pipeline" in str(task._find_obstacle({}, tokens))


def test_a_recorded_evaluation_counts_for_the_model_that_it_measured(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"rows")
    evaluation = EvalReport(
        uri=str(tmp_path),
        digest=storage.digest_folder(tmp_path),
        model_digest="m",
        conditions="c",
        num_examples=1,
        metrics={"nll": 1.0},
    )
    tags = {"sft.evaluation": evaluation.model_dump_json(), "sft.model_digest": "m"}
    assert task._recorded_evaluation(tags) == evaluation
    assert task._recorded_evaluation({**tags, "sft.model_digest": "another"}) is None
    assert task._recorded_evaluation({"sft.model_digest": "m"}) is None


def test_a_promoted_version_takes_the_place_of_the_champion_it_was_compared_with(make_version: MakeVersion) -> None:
    for _ in range(2):
        make_version("placed")
    assert task._take_place(versions.get_version("placed", "1"), None, _PROMOTED) is None
    assert task._take_place(versions.get_version("placed", "2"), _COMPARED_WITH_1, _PROMOTED) == "1"
    assert versions.aliases_of("placed", "2") == ("challenger", "champion")
    assert versions.aliases_of("placed", "1") == ("previous",)
    # A resumed run finds it done.
    assert task._take_place(versions.get_version("placed", "2"), _COMPARED_WITH_1, _PROMOTED) is None


def test_a_refused_version_is_challenger_only(make_version: MakeVersion) -> None:
    make_version("refused", gate="refused")
    assert task._take_place(versions.get_version("refused", "1"), None, _REFUSED) is None
    assert versions.aliases_of("refused", "1") == ("challenger",)


def test_a_run_that_was_overtaken_while_it_worked_moves_nothing(make_version: MakeVersion) -> None:
    for _ in range(3):
        make_version("late")
    task._take_place(versions.get_version("late", "1"), None, _PROMOTED)
    task._take_place(versions.get_version("late", "2"), _COMPARED_WITH_1, _PROMOTED)
    with pytest.raises(promotion.OvertakenError, match="version 2 is champion now, and not version 1"):
        task._take_place(versions.get_version("late", "3"), _COMPARED_WITH_1, _PROMOTED)
    assert versions.aliases_of("late", "2") == ("champion",)
    assert versions.aliases_of("late", "3") == ("challenger",)
