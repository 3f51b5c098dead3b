"""How a template's turns end, and where its prompts end, learnt from a probe conversation."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from tasks.tokenization.errors import MaskError

# Letters and digits only, so that no template trims, escapes or interprets them.
USER, ANSWER, NEXT = "Quid9vexat7Zo", "Respondeo4Kuj8", "Deinde2wob5Ty"


@dataclass(frozen=True)
class Ending:
    """What follows the words of an assistant message.

    `tail` is all that the template writes after the last message's words; `kept` is its front that the model has to
    say; `closed` tells whether that front ends in an added token, the end of turn. `prompt_tail` is what the template
    writes between a user's words and the place where the model goes on.
    """

    tail: str = ""
    kept: str = ""
    closed: bool = False
    prompt_tail: str = ""
    user_frame: str = ""
    """What the template writes around a user's words."""
    frame: str = ""
    """All that the template writes around the probe's words."""
    opening: str = ""
    """The generation prompt, of templates that write it whether it is asked for or not; `tail` is what precedes it."""
    known: bool = False
    """False where the template refuses the probe: turns are then judged by their own last token."""


def find_ending(
    render: Callable[[list[dict[str, Any]], bool], str], added: re.Pattern[str], eos: str | None = None
) -> Ending:
    """Probe a template: question, answer, and a further question.

    The tail of a last message may hold more than the end of turn (phi-3 adds eos to the text's end), and the tail of
    an earlier one less (gpt-oss writes another token in history). The end of turn is the first run of added tokens
    of the last message's tail, cut to what history also has where it has any of it.
    """
    question = {"role": "user", "content": USER}
    answer = {"role": "assistant", "content": ANSWER}
    try:
        last = render([question, answer], False)
        prompt = render([question], True)
        is_always_prompted = render([question], False) == prompt
    except MaskError:
        return Ending()
    if last.count(ANSWER) != 1 or prompt.count(USER) != 1:
        return Ending()
    tail = last.split(ANSWER)[1]
    try:
        history = render([question, answer, {"role": "user", "content": NEXT}], False).partition(ANSWER)[2]
    except MaskError:
        history = ""
    before, _, after = prompt.partition(USER)
    opening = _find_opening(tail, after, eos) if is_always_prompted else ""
    tail = tail.removesuffix(opening)
    run = _first_run(tail, added)
    if not run:
        kept, closed = tail.rstrip(), False
    else:
        kept, closed = tail[: _end_of_turn(tail, history, run)], True
    frame = "\n".join([before, after, *last.replace(USER, ANSWER).split(ANSWER), history])
    return Ending(tail, kept, closed, after, before[-64:] + after, frame, opening, True)


def _find_opening(tail: str, prompt_tail: str, eos: str | None) -> str:
    """Return what follows an answer's eos and ends a prompt too: the next answer's beginning."""
    _, found, opening = tail.rpartition(eos) if eos else ("", "", "")
    return opening if found and opening and prompt_tail.endswith(opening) else ""


def find_anchor(prompt_tail: str, added: re.Pattern[str]) -> str:
    """Return the end of a prompt from its last added token on, or nothing when it holds none."""
    starts = [match.start() for match in added.finditer(prompt_tail)]
    return prompt_tail[starts[-1] :] if starts else ""


def any_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of tokens as a group, longer ones first."""
    return re.compile("(" + ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)") + ")")


def _first_run(tail: str, added: re.Pattern[str]) -> list[int]:
    """Return the end positions of the first added tokens that follow one another without text between."""
    ends: list[int] = []
    for match in added.finditer(tail):
        if ends and match.start() != ends[-1]:
            break
        ends.append(match.end())
    return ends


def _end_of_turn(tail: str, history: str, run: list[int]) -> int:
    """Return where the end of turn ends: the longest part of the run that history has too, else all of it."""
    shared = [end for end in run if history.startswith(tail[:end])]
    return shared[-1] if shared else run[-1]
