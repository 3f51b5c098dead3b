"""Says whether what was served is the version that was recorded, and what speaks against it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from schemas.proofs import RecordedAnswer, ServingProbes
from tasks.proving.replay import Reply, Said

Outcome = Literal["same", "different", "undecided"]
EXACT_SHARE = 1 / 8
"""Of the difference that bfloat16 makes: what weights of 32 bits may differ when they are served as they are stored."""
ROUNDED_SHARE = 2.0
"""Of the same: what two ways to compute in 16 bits may differ."""
FLOOR = 5e-4
"""Nats; another order of summation makes less."""
WORST = 5.0
"""Nats that one alternative counts at most: a few unlikely tokens do not decide."""
MIN_POSITIONS = 16
"""Fewer compared positions show nothing."""


@dataclass(frozen=True)
class Proof:
    """The verdict, and what it is made of."""

    outcome: Outcome
    reasons: tuple[str, ...]
    """Against it being the version; empty where nothing speaks against it."""
    notes: tuple[str, ...]
    """What could not be shown."""
    num_probes: int
    num_positions: int
    """Tokens whose log-probabilities were compared."""
    difference: float | None
    """Mean absolute difference of log-probabilities, in nats."""
    limit: float
    knows_prompts: bool
    """The ids of the prompts were compared, and not only their number."""


@dataclass
class _Findings:
    """What the replies show, reply by reply."""

    errors: list[Reply] = field(default_factory=list)
    longer: list[tuple[Reply, int]] = field(default_factory=list)
    """Prompts of another length, with the difference in tokens."""
    other_ids: list[Reply] = field(default_factory=list)
    other_tokens: list[str] = field(default_factory=list)
    not_best: int = 0
    """Positions at which the served token is not the most likely one by the server's own numbers."""
    runs_on: list[str] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    base_differences: list[float] = field(default_factory=list)
    num_positions: int = 0
    num_ended: int = 0
    without_logprobs: list[Reply] = field(default_factory=list)


def find_limit(probes: ServingProbes, precision: str) -> float:
    """Return the largest mean difference of an honest serving, in nats.

    Args:
        probes: recorded.
        precision: stored, for weights served as they are stored; bf16, where rounding to 16 bits is meant.
    """
    rounding = probes.rounding if probes.rounding is not None else 0.02
    is_exact = precision == "stored" and probes.stored in ("float32", "float64")
    return max(FLOOR, rounding * (EXACT_SHARE if is_exact else ROUNDED_SHARE))


def judge_replies(replies: Sequence[Reply], probes: ServingProbes, *, precision: str = "stored") -> Proof:
    """Compare what was served with what was recorded; see Proof."""
    limit = find_limit(probes, precision)
    found = _Findings()
    for reply in replies:
        if reply.error:
            found.errors.append(reply)
            continue
        _compare_prompts(reply, found)
        if reply.said is None:
            found.without_logprobs.append(reply)
            _compare_text(reply, probes, found)
        else:
            _compare_tokens(reply, reply.said, probes, found, margin=max(0.02, 20 * limit))
    difference = fmean(found.differences) if found.differences else None
    reasons = [*_explain_prompts(found, replies), *_explain_answers(found, difference, limit)]
    notes = _list_gaps(found, replies)
    is_shown = not found.without_logprobs and found.num_positions >= MIN_POSITIONS
    outcome: Outcome = "different" if reasons else "same" if is_shown else "undecided"
    return Proof(
        outcome=outcome,
        reasons=tuple(reasons),
        notes=tuple(notes),
        num_probes=len(replies),
        num_positions=found.num_positions,
        difference=difference,
        limit=limit,
        knows_prompts=all(reply.prompt is not None for reply in replies),
    )


def _compare_prompts(reply: Reply, found: _Findings) -> None:
    expected = reply.probe.prompt
    if reply.prompt is not None and reply.prompt != expected:
        found.other_ids.append(reply)
    served = len(reply.prompt) if reply.prompt is not None else reply.num_prompt
    if served is not None and served != len(expected):
        found.longer.append((reply, served - len(expected)))


def _compare_text(reply: Reply, probes: ServingProbes, found: _Findings) -> None:
    answer = reply.probe.answer
    text = "".join(probes.texts[token] for token in answer.tokens)
    if reply.reason == "length" and answer.ended:
        found.runs_on.append(reply.probe.name)
    found.num_ended += answer.ended
    if reply.content.strip() and not reply.content.strip().startswith(text.strip()):
        found.other_tokens.append(reply.probe.name)


def _compare_tokens(
    reply: Reply, said: Sequence[Said], probes: ServingProbes, found: _Findings, *, margin: float
) -> None:
    """Compare token by token up to the first other one: behind it the two answers are to different texts."""
    answer = reply.probe.answer
    found.num_ended += answer.ended
    for place, token in enumerate(answer.tokens):
        if place >= len(said):
            found.other_tokens.append(f"{reply.probe.name} (it ends after {len(said)} tokens)")
            return
        given = said[place]
        found.num_positions += 1
        _compare_position(given, answer, place, probes, found)
        if reply.probe.base is not None and place == 0 and reply.probe.base.alternatives:
            found.base_differences += _list_differences(given, reply.probe.base, 0, probes)
        if given.top and max(logprob for *_, logprob in given.top) - given.logprob > margin:
            found.not_best += 1
        if not _is_token(given.token, given.text, token, probes):
            # Two tokens as likely as each other: either may come first in another order of summation.
            if _margin(answer, place, given, probes) > margin:
                found.other_tokens.append(f"{reply.probe.name} (token {place + 1})")
            return
    # Some servers count the stop token among the answer's.
    behind = len(said) - len(answer.tokens)
    if answer.ended and (reply.reason == "length" or behind > 1):
        found.runs_on.append(reply.probe.name)


def _compare_position(given: Said, answer: RecordedAnswer, place: int, probes: ServingProbes, found: _Findings) -> None:
    found.differences += _list_differences(given, answer, place, probes)


def _list_differences(given: Said, answer: RecordedAnswer, place: int, probes: ServingProbes) -> list[float]:
    """Return the absolute differences of the three most likely recorded tokens at a position, in nats."""
    differences = []
    recorded = answer.alternatives[place]
    for token, logprob in recorded[:3]:
        served = [other for name, text, other in given.top if _is_token(name, text, token, probes)]
        differences.append(min(WORST, abs(served[0] - logprob)) if served else _bound(given, logprob))
    return differences


def _bound(given: Said, logprob: float) -> float:
    """Return the least difference of a token that the server does not name: it is at most as likely as its last one."""
    return min(WORST, max(0.0, logprob - given.top[-1][2])) if given.top else 0.0


def _margin(answer: RecordedAnswer, place: int, given: Said, probes: ServingProbes) -> float:
    """Return how much less likely the served token was recorded than the best, in nats."""
    recorded = answer.alternatives[place]
    known = [logprob for token, logprob in recorded if _is_token(given.token, given.text, token, probes)]
    return recorded[0][1] - known[0] if known else WORST


def _is_token(name: int | None, text: str, token: int, probes: ServingProbes) -> bool:
    return name == token if name is not None else text == probes.texts.get(token)


def _explain_prompts(found: _Findings, replies: Sequence[Reply]) -> list[str]:
    """Say what other prompts look like."""
    reasons = []
    if found.errors:
        named = ", ".join(f"{reply.probe.name} ({reply.error})" for reply in found.errors[:2])
        reasons.append(f"{len(found.errors)} of {len(replies)} requests were refused: {named}")
    longer = {reply.probe.name: by for reply, by in found.longer}
    answered = [reply for reply in replies if not reply.error]
    if longer and set(longer) == {"long"} and longer["long"] < 0:
        reasons.append(f"the context is cut: the long prompt lost {-longer['long']} tokens")
    elif longer and len(longer) == len(answered) and set(longer.values()) == {1}:
        reasons.append("every prompt has one token more: BOS is written twice, or the template begins otherwise")
    elif longer and all(not _has_system(reply) for reply, _ in found.longer):
        by = sorted(set(longer.values()))
        reasons.append(
            f"{len(longer)} prompts without a system message differ by {by[0]:+d} tokens, and those with one do not: "
            "another default system message"
            if any(_has_system(reply) for reply in answered if reply.probe.name not in longer)
            else f"{len(longer)} prompts have another length ({by[0]:+d} to {by[-1]:+d} tokens): another chat template"
        )
    elif longer:
        reasons.append(
            f"{len(longer)} of {len(answered)} prompts have another length: another chat template or tokenizer"
        )
    same_length = [reply for reply in found.other_ids if reply.probe.name not in longer]
    if same_length:
        reasons.append(
            f"{len(same_length)} prompts have as many tokens and other ids: another chat template or tokenizer"
        )
    return reasons


def _has_system(reply: Reply) -> bool:
    return any(message["role"] in ("system", "developer") for message in reply.probe.messages)


def _explain_answers(found: _Findings, difference: float | None, limit: float) -> list[str]:
    reasons = []
    if found.runs_on:
        reasons.append(
            f"{len(found.runs_on)} of {found.num_ended} answers go on behind their end: a stop token is lost"
        )
    if found.not_best:
        reasons.append(
            f"at {found.not_best} positions the served token is not the most likely one, though temperature 0 was "
            "asked for: sampling or a penalty is forced"
        )
    if found.other_tokens:
        reasons.append(
            f"{len(found.other_tokens)} answers differ where the recorded choice was clear: "
            + ", ".join(found.other_tokens[:3])
        )
    if difference is not None and difference > limit:
        has_other_prompts = found.other_ids or found.longer
        why = (
            "other prompts alone may do that"
            if has_other_prompts
            else "other weights, another precision, or a quantized copy"
        )
        reasons.append(f"log-probabilities differ by {difference:.2g} nats in the mean, above {limit:.2g}: {why}")
        base = fmean(found.base_differences) if found.base_differences else None
        if base is not None and base < min(difference, 10 * limit):
            reasons.append(f"it answers as its base model does ({base:.2g} nats from it): the training is not served")
    return reasons


def _list_gaps(found: _Findings, replies: Sequence[Reply]) -> list[str]:
    notes = []
    if found.without_logprobs:
        notes.append("the server tells no log-probabilities: precision and weights are shown by the tokens alone")
    if any(reply.prompt is None and reply.num_prompt is None for reply in replies if not reply.error):
        notes.append("the server tells nothing of its prompts: a template is shown by the answers alone")
    if not found.num_ended:
        notes.append("no recorded answer ended: whether a stop token is lost is not shown")
    return notes
