"""The description on a version's page in MLflow: what it is, and a table of its metrics before and after."""

from collections.abc import Mapping

from schemas.artifacts import ComparisonReport, Decision, Delta

MAX_CHARACTERS = 5000
"""MLflow's column for a version's description."""


def describe_version(title: str, comparison: ComparisonReport, decision: Decision, links: str) -> str:
    """Return Markdown: title, verdict with its reasons, the table of measures, warnings, and where to look further.

    Args:
        title: what the version is.
        comparison: with the base model, and with the champion where there was one.
        decision: of the gate, or of whoever was faster.
        links: a line of Markdown.
    """
    lines = [title, "", f"Gate: **{decision.verdict}**", *(f"- {reason}" for reason in decision.reasons), ""]
    lines += [comparison.sentence, ""]
    if comparison.num_examples:
        lines += [f"Against the base model, on {comparison.num_examples} held-out rows:", ""]
        lines += _table("base", comparison.before, comparison.delta)
    champion = comparison.champion
    if champion is not None and champion.num_examples:
        lines += ["", f"Against champion version {champion.version}, on {champion.num_examples} rows new to both:", ""]
        lines += _table("champion", champion.metrics, champion.delta)
    lines += _list_warnings(comparison)
    # Reasons may be long where something went wrong; the links matter more than the table's last rows.
    return "\n".join(lines)[: MAX_CHARACTERS - len(links) - 2] + f"\n\n{links}"


def describe_decision(decision: Decision, comparison: ComparisonReport, what: str) -> str:
    """Return Markdown that says what the gate decided and what it looked at, for a page of its own.

    Args:
        decision: of the gate, or of whoever was faster.
        comparison: that it was decided on.
        what: name and version, where there is one.
    """
    lines = [
        f"# {what}: {decision.verdict}",
        "",
        comparison.sentence,
        "",
        "| | what the gate looked at |",
        "| --- | --- |",
    ]
    for check in decision.checks:
        finding = check.finding.replace("|", "\\|")
        lines.append(f"| {'passed' if check.passed else '**failed**'} | {finding} |")
    return "\n".join([*lines, *_list_warnings(comparison)]) + "\n"


def _list_warnings(comparison: ComparisonReport) -> list[str]:
    if not comparison.warnings:
        return []
    return ["", "## Please note", "", *(f"- {warning}" for warning in comparison.warnings)]


def _table(rival: str, values: Mapping[str, float], deltas: Mapping[str, Delta]) -> list[str]:
    lines = [f"| | {rival} | this version | change | interval |", "| --- | ---: | ---: | ---: | --- |"]
    for name, delta in deltas.items():
        before = values[name]
        after = before + delta.value
        lines.append(f"| {name} | {before + 0.0:.4g} | {after + 0.0:.4g} | {delta.change} | {delta.interval} |")
    return lines
