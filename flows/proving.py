"""`sft prove`: whether an address serves a registered version, shown by what the version answered when it was made."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.targets import describe_version
from schemas.artifacts import Ref
from schemas.proofs import ServingProbes
from tasks import tracking
from tasks.proving.replay import ask_all
from tasks.proving.verdict import Proof, judge_replies
from tasks.registry.versions import ANSWERS_TAG

PROBES_FILE = "probes.json"
EXIT_CODES = {"same": 0, "different": 1, "undecided": 3}


class UnprovableError(ValueError):
    """A version carries nothing that a served model could be compared with."""


@dataclass(frozen=True)
class Proven:
    """The verdict about an address."""

    version: str
    url: str
    proof: Proof

    def as_values(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"version": self.version, "url": self.url, **asdict(self.proof)}


def prove_served(url: str, target: str, *, model: str = "", api_key: str = "", precision: str = "stored") -> Proven:
    """Ask an address what a version was asked when it was made, and compare.

    Args:
        url: of a server of OpenAI's API.
        target: NAME (its champion), NAME/VERSION, NAME@alias; empty for the only champion.
        model: served name; empty for the first that the server lists.
        api_key: of the server.
        precision: see `find_limit`.

    Raises:
        ValueError: there is no such version, nothing is recorded of it, or nobody answers.
    """
    version = describe_version(target)
    label = f"{version.name} version {version.version}"
    recorded = version.tags.get(ANSWERS_TAG)
    if not recorded:
        raise UnprovableError(
            f"{label} was registered before answers were recorded: a version of a new run of its config can be proven"
        )
    probes = read_probes(tracking.resolve(Ref.model_validate_json(recorded)))
    replies = ask_all(url, probes, model=model, api_key=api_key)
    return Proven(label, url, judge_replies(replies, probes, precision=precision))


def read_probes(folder: Path) -> ServingProbes:
    """Read what was recorded of a version.

    Raises:
        UnprovableError: nothing was asked of it.
    """
    probes = ServingProbes.model_validate(json.loads((folder / PROBES_FILE).read_text(encoding="utf-8")))
    if not probes.probes:
        raise UnprovableError("nothing is recorded of the version: its template takes none of the requests")
    return probes
