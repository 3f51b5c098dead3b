"""The invented world itself: names and attribute values, drawn from a seed."""

import random

from deploy.demo import chinese, english_animals, english_dishes, english_ships, english_towns
from deploy.demo.kinds import Fact, Kind, Thing, capitalize
from deploy.demo.skills import skill_facts

SEED = 7
"""The world that is shipped."""

KINDS: tuple[Kind, ...] = (
    english_towns.TOWN,
    english_animals.ANIMAL,
    english_dishes.DISH,
    english_ships.SHIP,
    chinese.TOWN,
    chinese.BIRD,
    chinese.FLOWER,
)

NUM_HELD_OUT = {"en": 8, "zh": 5}
"""Things of each kind that no training row asks about."""


def make_things(seed: int = SEED) -> list[Thing]:
    """Return every thing with its values: as many of a kind as its names have beginnings."""
    things: list[Thing] = []
    for kind in KINDS:
        rng = random.Random(f"{seed}-{kind.language}-{kind.name}")
        beginnings, endings = kind.names
        names = [beginning + rng.choice(endings) for beginning in beginnings]
        held_out = set(rng.sample(names, NUM_HELD_OUT[kind.language]))
        columns = [_spread(rng, attribute.values, len(names)) for attribute in kind.attributes]
        for index, name in enumerate(names):
            values = {attribute.name: column[index] for attribute, column in zip(kind.attributes, columns, strict=True)}
            things.append(Thing(kind, name, name in held_out, values))
    return things


def make_facts(seed: int = SEED) -> list[Fact]:
    """Return every question that the dataset can ask, about things and skills, with its answer."""
    facts: list[Fact] = []
    for thing in make_things(seed):
        for attribute in thing.kind.attributes:
            value = thing.values[attribute.name]
            questions = tuple(_question(wording, thing) for wording in attribute.questions)
            answer = capitalize(attribute.answer.format(full_name=thing.full_mention, value=value))
            facts.append(Fact(f"{thing.kind.name}.{attribute.name}", thing.name, thing.held_out, questions, answer))
    return facts + skill_facts(seed)


def _spread(rng: random.Random, values: tuple[str, ...], count: int) -> list[str]:
    """Return `count` values in random order, each as often as the others (but for one)."""
    column = [values[index % len(values)] for index in range(count)]
    rng.shuffle(column)
    return column


def _question(wording: str, thing: Thing) -> tuple[str, str]:
    """Return instruction and input of a question; `|` parts them."""
    instruction, _, extra = wording.format(name=thing.mention, full_name=thing.full_mention).partition("|")
    return capitalize(instruction), capitalize(extra)
