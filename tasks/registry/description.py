"""The description on a version's page in MLflow: what it is, and a table of its metrics before and after."""

from collections.abc import Mapping

from schemas.artifacts import ComparisonReport, Delta

MAX_CHARACTERS = 5000
"""MLflow's column for a version's description."""


def describe_version(
    title: str, comparison: ComparisonReport, verdict: str, reasons: tuple[str, ...], links: str
) -> str:
    """Return Markdown: title, verdict with its reasons, the table of measures, and where to look further.

    Args:
        title: what the version is.
        comparison: with the base model, and with the champion where there was one.
        verdict: of the gate.
        reasons: of the verdict.
        links: a line of Markdown.
    """
    lines = [title, "", f"Gate: **{verdict}**", *(f"- {reason}" for reason in reasons), ""]
    lines += [f"Against the base model, on {comparison.num_examples} held-out rows:", ""]
    lines += _table("base", comparison.before, comparison.delta)
    champion = comparison.champion
    if champion is not None and champion.num_examples:
        lines += ["", f"Against champion version {champion.version}, on {champion.num_examples} rows new to both:", ""]
        lines += _table("champion", champion.metrics, champion.delta)
    # Reasons may be long where something went wrong; the links matter more than the table's last rows.
    return "\n".join(lines)[: MAX_CHARACTERS - len(links) - 2] + f"\n\n{links}"


def _table(rival: str, values: Mapping[str, float], deltas: Mapping[str, Delta]) -> list[str]:
    lines = [f"| | {rival} | this version | change | interval |", "| --- | ---: | ---: | ---: | --- |"]
    for name, delta in deltas.items():
        before = values[name]
        interval = f"{delta.ci_low:+.4g} to {delta.ci_high:+.4g}"
        lines.append(f"| {name} | {before:.4g} | {before + delta.value:.4g} | {delta.value:+.4g} | {interval} |")
    return lines
