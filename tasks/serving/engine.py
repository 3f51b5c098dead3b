"""A thread that owns a model and answers many requests at once: each step gives every living request a token."""

import logging
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tasks.evaluation.streaming import find_chances
from tasks.serving.lanes import Lanes

MAX_TOP_LOGPROBS = 20
"""As OpenAI's API allows."""
PROMPT_TOKENS = 8192
"""Most tokens of the prompts that enter in one forward pass; a longer prompt enters alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    seed: int = 0
    num_logprobs: int | None = None
    """Alternatives that are told beside each token, 0 to MAX_TOP_LOGPROBS; None for no log-probabilities at all."""


@dataclass(frozen=True)
class Chosen:
    """A token of an answer."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability at temperature 1."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens with theirs, best first."""


@dataclass(frozen=True)
class Ended:
    """The last thing that is told of a request."""

    reason: str
    """`stop` at a stop id, `length` where the room was used up, `error`."""
    error: str = ""


@dataclass
class Request:
    """A prompt to be answered; what happens to it is told from the engine's thread."""

    prompt: Sequence[int]
    room: int
    """Most tokens of the answer, at least 1."""
    sampling: Sampling
    tell: Callable[[Chosen | Ended], None]
    is_cancelled: bool = False
    """Set by whoever asked: nothing more is told."""
    num_tokens: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)


class AnswerEngine:
    """Answers requests until it is closed.

    Args:
        lanes: of the model; only the engine's thread uses them.
        stop_ids: that end an answer, and are no part of it.
    """

    def __init__(self, lanes: Lanes, stop_ids: frozenset[int]) -> None:
        self._lanes, self._stop_ids = lanes, stop_ids
        self._waiting: queue.Queue[Request | None] = queue.Queue()
        self._living: dict[int, Request] = {}
        self._newest: dict[int, int] = {}
        self._held: Request | None = None
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_living(self) -> int:
        """Requests that are being answered."""
        return len(self._living)

    @property
    def is_alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Let a request be answered; it waits where all rows are taken."""
        request.generator.manual_seed(request.sampling.seed)
        self._waiting.put(request)

    def close(self) -> None:
        """End the thread; whoever waits is told an error."""
        self._is_open = False
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._is_open:
            entering = self._take_waiting()
            try:
                if entering:
                    self._enter(entering)
                self._advance()
            except Exception as error:  # the server goes on: the next request may be a smaller one
                logger.exception("A step failed")
                self._fail_all(entering, f"{type(error).__name__}: {error}")
        rest = [self._held]
        while not self._waiting.empty():
            rest.append(self._waiting.get())
        self._fail_all([request for request in rest if request is not None], "the server is closing")

    def _take_waiting(self) -> list[Request]:
        """Return the requests that enter now; waits for one while nothing lives."""
        entering: list[Request] = []
        num_tokens = 0
        while len(entering) < self._lanes.num_free and self._is_open:
            request, self._held = self._held, None
            if request is None:
                try:
                    request = self._waiting.get(block=not self._living and not entering)
                except queue.Empty:
                    break
            if request is None or request.is_cancelled:
                continue
            if entering and num_tokens + len(request.prompt) > PROMPT_TOKENS:
                self._held = request
                break
            entering.append(request)
            num_tokens += len(request.prompt)
        return entering

    def _enter(self, entering: Sequence[Request]) -> None:
        handles, logits = self._lanes.enter([request.prompt for request in entering])
        self._living |= dict(zip(handles, entering, strict=True))
        self._choose(handles, logits)

    def _advance(self) -> None:
        for handle in [handle for handle, request in self._living.items() if request.is_cancelled]:
            self._drop(handle)
        if self._living:
            self._choose(*self._lanes.advance(self._newest))

    def _choose(self, handles: Sequence[int], logits: Tensor) -> None:
        """Choose a token of each row, tell it, and let rows that have ended go."""
        greedy = logits.argmax(dim=-1).tolist()
        for at, handle in enumerate(handles):
            request = self._living[handle]
            sampling = request.sampling
            try:
                token = greedy[at] if sampling.temperature <= 0 else draw(logits[at], sampling, request.generator)
            except RuntimeError as error:  # logits that are no numbers: the other rows have their own
                self._end(handle, "error", f"{type(error).__name__}: {error}")
                continue
            if token in self._stop_ids:
                self._end(handle, "stop")
                continue
            request.num_tokens += 1
            self._newest[handle] = token
            request.tell(describe(token, logits[at], sampling.num_logprobs))
            if request.num_tokens >= request.room:
                self._end(handle, "length")

    def _end(self, handle: int, reason: str, error: str = "") -> None:
        request = self._living[handle]
        self._drop(handle)
        request.tell(Ended(reason, error))

    def _drop(self, handle: int) -> None:
        del self._living[handle]
        self._newest.pop(handle, None)
        self._lanes.leave(handle)

    def _fail_all(self, entering: Sequence[Request], why: str) -> None:
        failed = {id(request): request for request in (*entering, *self._living.values())}
        self._living, self._newest = {}, {}
        self._lanes.clear()
        for request in failed.values():
            request.tell(Ended("error", why))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token of logits [V]: softmax at the temperature, then the most likely ones that make up `top_p`.

    Nucleus sampling of Holtzman et al. 2020, arXiv:1904.09751: the most likely token is always among them.
    """
    chances = find_chances(logits, sampling.temperature)
    if sampling.top_p < 1.0:
        ordered, ids = chances.sort(descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered > sampling.top_p] = 0.0
        return int(ids[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(chances, 1, generator=generator))


def describe(token: int, logits: Tensor, num_logprobs: int | None) -> Chosen:
    """Return a token with its log-probability and the most likely ones, where they are asked for."""
    if num_logprobs is None:
        return Chosen(token)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(num_logprobs, len(logprobs)))
    top = tuple(zip(ids.tolist(), map(_as_number, values.tolist()), strict=True))
    return Chosen(token, _as_number(float(logprobs[token])), top)


def _as_number(logprob: float) -> float:
    """Return a log-probability as JSON has it, and as OpenAI's API writes one that is out of reach."""
    return logprob if math.isfinite(logprob) else -9999.0
