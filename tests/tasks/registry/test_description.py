"""A version's description says what it is, what the gate said, and before and after; never more than MLflow takes."""

from schemas.artifacts import ChampionReport, ComparisonReport, Decision, Delta, GateCheck
from tasks.registry.description import MAX_CHARACTERS, describe_version

_GAIN = {"exact_match": Delta(value=0.25, ci_low=0.1, ci_high=0.4)}
_CHAMPION = ChampionReport(
    version="3", num_examples=30, num_seen=10, metrics={"exact_match": 0.5}, delta=_GAIN, notes=()
)
_COMPARISON = ComparisonReport(
    uri="runs:/x",
    digest="d",
    num_examples=40,
    sentence="It is better.",
    decision=Decision(verdict="promoted", checks=(GateCheck(kind="gain", passed=True, finding="it gained"),)),
    before={"exact_match": 0.0},
    after={"exact_match": 0.75},
    delta={"exact_match": Delta(value=0.75, ci_low=0.6, ci_high=0.9)},
    champion=_CHAMPION,
)


def test_both_comparisons_are_tables_with_their_rows() -> None:
    text = describe_version("base on rows, 2026", _COMPARISON, _COMPARISON.decision, "[run](there)")
    assert text.splitlines() == [
        "base on rows, 2026",
        "",
        "Gate: **promoted**",
        "- it gained",
        "",
        "It is better.",
        "",
        "Against the base model, on 40 held-out rows:",
        "",
        "| | base | this version | change | interval |",
        "| --- | ---: | ---: | ---: | --- |",
        "| exact_match | 0 | 0.75 | +0.75 | +0.6 to +0.9 |",
        "",
        "Against champion version 3, on 30 rows new to both:",
        "",
        "| | champion | this version | change | interval |",
        "| --- | ---: | ---: | ---: | --- |",
        "| exact_match | 0.5 | 0.75 | +0.25 | +0.1 to +0.4 |",
        "",
        "[run](there)",
    ]


def test_warnings_are_told_with_the_version() -> None:
    warned = _COMPARISON.model_copy(update={"warnings": ("12 of 40 examples had to be cut",)})
    text = describe_version("t", warned, warned.decision, "[run](there)")
    assert "## Please note\n\n- 12 of 40 examples had to be cut\n\n[run](there)" in text


def test_the_links_stay_where_the_reasons_are_endless() -> None:
    endless = Decision(verdict="refused", checks=(GateCheck(kind="gain", passed=False, finding="why " * 5000),))
    text = describe_version("t", _COMPARISON, endless, "[run](there)")
    assert len(text) == MAX_CHARACTERS
    assert text.endswith("\n\n[run](there)")
