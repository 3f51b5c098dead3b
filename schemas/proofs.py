"""What a version answered when it was registered, for whoever wants to know later whether it is what is served."""

from typing import Any

from pydantic import BaseModel, ConfigDict

Alternatives = tuple[tuple[int, float], ...]
"""(token, log-probability in nats), best first."""


class RecordedAnswer(BaseModel):
    """A model's greedy answer to a prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: tuple[int, ...]
    """Without the stop id."""
    ended: bool
    """A stop id ended it, and not the limit."""
    alternatives: tuple[Alternatives, ...]
    """The most likely tokens at each of its positions."""


class ServingProbe(BaseModel):
    """A request, and what the version and its base answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    prompt: tuple[int, ...]
    """Ids that the model sees."""
    answer: RecordedAnswer
    base: RecordedAnswer | None = None
    """None where the base cannot be asked: it lacks tokens of the prompt."""


class ServingProbes(BaseModel):
    """All that is recorded of a version."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probes: tuple[ServingProbe, ...]
    texts: dict[int, str]
    """What each token of prompts' answers and alternatives spells, special tokens written out."""
    stored: str
    """Precision of the stored weights, such as float32 or bfloat16."""
    computed: str
    """Precision in which the answers were computed."""
    rounding: float | None
    """Mean absolute difference in nats that computing in bfloat16 makes to the alternatives; None where the answers
    themselves were computed in 16 bits."""
