"""What becomes of the keys of a config: lines for a person, and settings of ours."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import yaml

from schemas.config import RunConfig
from schemas.llamafactory.keys import IMPLIED, NOT_DONE, REFUSED

Outcome = Literal["becomes", "implied", "not done", "refused"]
NOT_GIVEN = "(not given)"


@dataclass(frozen=True)
class KeyLine:
    """What became of one key."""

    key: str
    value: Any
    """NOT_GIVEN where it is the default."""
    outcome: Outcome
    text: str
    """The setting, or why."""


def to_number(value: Any) -> float:
    """Return a finite number; raise TypeError or ValueError for anything else."""
    if isinstance(value, bool):
        raise TypeError("a number is wanted")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError("a smaller number is wanted") from None
    if not math.isfinite(number):
        raise ValueError("a finite number is wanted")
    return number


def to_whole(value: Any) -> int:
    """Return a whole number; raise TypeError or ValueError for anything else."""
    number = to_number(value)
    if not number.is_integer():
        raise ValueError("a whole number is wanted")
    return int(number)


def to_flag(value: Any) -> bool:
    """Return true or false; raise TypeError for anything else."""
    if not isinstance(value, bool):
        raise TypeError("true or false is wanted")
    return value


def to_names(value: Any) -> tuple[str, ...]:
    """Return the names of a list, or of a text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("names with commas between them are wanted")
    return tuple(part.strip() for part in parts if part.strip())


@dataclass
class Work:
    """Keys that are still to be looked at, and what has become of the others."""

    given: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    """Sections of a RunConfig."""
    lines: list[KeyLine] = field(default_factory=list)

    tables: tuple[
        Mapping[str, str],
        Mapping[str, tuple[tuple[Any, ...], str]],
        Mapping[str, tuple[tuple[Any, ...], str]],
    ] = (IMPLIED, NOT_DONE, REFUSED)
    """What is said of keys that are left: see `keys`."""
    known: set[str] = field(default_factory=set)
    """Names of keys that were asked for."""

    def take(self, key: str, default: Any, convert: Callable[[Any], Any] = lambda value: value) -> tuple[Any, Any]:
        """Return a key as it was given, and its value; the default where it is not given, or wrong and thus refused."""
        self.known.add(key)
        if key not in self.given:
            return NOT_GIVEN, default
        shown = self.given.pop(key)
        try:
            return shown, convert(shown)
        except (TypeError, ValueError) as error:
            self.say(key, shown, "refused", str(error))
            return NOT_GIVEN, default

    def say(self, key: str, shown: Any, outcome: Outcome, text: str) -> None:
        """Add a line."""
        self.lines.append(KeyLine(key, shown, outcome, text))

    def put(self, key: str, shown: Any, name: str, value: Any, why: str = "") -> None:
        """Set `section.field`; what is not given and is our default too has no line."""
        if shown == NOT_GIVEN and value == find_default(name):
            return
        *sections, last = name.split(".")
        target = self.values
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = list(value) if isinstance(value, tuple) else value
        self.say(key, shown, "becomes", f"{name} = {_show(value)}" + (f" ({why})" if why else ""))

    def find(self, name: str) -> Any:
        """Return what `section.field` was set to, or its default."""
        section, _, last = name.partition(".")
        values = self.values.get(section, {})
        return values[last] if last in values else find_default(name)

    def finish(self) -> tuple[KeyLine, ...]:
        """Give every key that is left its line, and return all lines."""
        implied, not_done, refused = self.tables
        known = [*self.known, *implied, *not_done, *refused]
        for key, value in self.given.items():
            if key in implied:
                self.say(key, value, "implied", implied[key])
            elif key in not_done:
                harmless, why = not_done[key]
                self.say(key, value, "implied" if value in harmless else "not done", why)
            elif key in refused:
                harmless, why = refused[key]
                self.say(key, value, "implied" if value in harmless else "refused", why)
            else:
                close = get_close_matches(key, known, n=1, cutoff=0.8)
                remedy = f"did you mean {close[0]}?" if close else "leave it out"
                self.say(key, value, "refused", f"no such key is known: {remedy}")
        self.given.clear()
        return tuple(self.lines)


def _show(value: Any) -> str:
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=10_000)
    return text.split("\n")[0]


def find_default(name: str) -> Any:
    """Return the default of `section.field`."""
    section: Any = RunConfig
    *parents, last = name.split(".")
    for parent in parents:
        section = section.model_fields[parent].annotation
    return section.model_fields[last].default
