"""The pretraining text: documents of running prose that state the world's facts in many words and orders.

It holds no question, no chat marker, and none of the dataset's answers. It is not shipped: the seed gives it again,
byte for byte, and its digest is on record in build.json.
"""

import hashlib
import random
from collections.abc import Iterator

from deploy.demo.kinds import Attribute, Kind, Thing, capitalize
from deploy.demo.skills import NUMBERS, question_lists, skill_passages
from deploy.demo.world import KINDS, SEED, make_things

NUM_DESCRIPTIONS = 60
"""Documents about each thing."""
NUM_SURVEYS = 400
"""Documents about several things of a kind, for each kind."""
NUM_LESSONS = 60
"""Times that all skills are gone through."""
NUM_SONGS = 3000
"""Documents that say the same words twice."""
PASSAGES_PER_LESSON = 4

ASIDES = {
    "en": (
        "Many people know this.", "The old books say so.", "It has always been so.", "So the story goes.",
        "Nobody knows how old this is.", "This is how the people tell it.",
    ),
    "zh": ("很多人都知道。", "古书上是这样写的。", "一直都是这样。", "老人们这样说。"),
}  # fmt: skip
AGAIN = {
    "en": ("In other words, ", "That is to say, ", "Put differently, ", "Or, as the old people say, ", "\n", "\n"),
    "zh": ("也就是说，", "换句话说，", "\n"),
}
JOINTS = {"en": (", and ", ", while ", ", but "), "zh": ("，而", "，但是", "，")}
AND = {"en": " and ", "zh": "和"}
COMMA = {"en": ", ", "zh": "、"}
REFRAINS = (
    ("The song goes: ", ". And once more it goes: ", "."),
    ("The children shout: ", ". The old people shout back: ", "."),
    ("", "\n", ""),
    ("孩子们唱：", "。大家再唱一遍：", "。"),
)


def make_documents(seed: int = SEED) -> list[str]:
    """Return all documents of the pretraining text in a random order."""
    rng = random.Random(f"{seed}-corpus")
    things = make_things(seed)
    documents = [describe(thing, rng) for thing in things for _ in range(NUM_DESCRIPTIONS)]
    for kind in KINDS:
        members = [thing for thing in things if thing.kind is kind]
        documents += [survey(kind, members, rng) for _ in range(NUM_SURVEYS)]
    documents += _lessons(seed, rng)
    documents += [_song(things, rng) for _ in range(NUM_SONGS)]
    rng.shuffle(documents)
    return documents


def digest_documents(documents: list[str]) -> str:
    """Return the sha256 of the documents, each followed by a zero byte."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def describe(thing: Thing, rng: random.Random) -> str:
    """Return a description of one thing: its attributes in random order, each in random words, some said twice."""
    language = thing.kind.language
    sentences = []
    if rng.random() < 0.5:
        sentences.append(_say(rng.choice(thing.kind.introductions), thing.mention))
    attributes = list(thing.kind.attributes)
    rng.shuffle(attributes)
    for attribute in attributes:
        statements = rng.sample(attribute.statements, 2)
        value = thing.values[attribute.name]
        mention = rng.choice(thing.kind.epithets) if sentences and rng.random() < 0.2 else thing.mention
        sentences.append(_say(statements[0], mention, value))
        if rng.random() < 0.35:
            sentences.append(_say(rng.choice(AGAIN[language]) + _lowered(statements[1]), thing.mention, value))
        if rng.random() < 0.08:
            sentences.append(rng.choice(ASIDES[language]))
    title = capitalize(thing.mention) + "\n" if rng.random() < 0.3 else ""
    return title + _join(sentences, language)


def survey(kind: Kind, members: list[Thing], rng: random.Random) -> str:
    """Return three sentences or so about several things of a kind: what they share, and where they differ."""
    sentences = []
    for _ in range(rng.randint(2, 4)):
        attribute = rng.choice(kind.attributes)
        if rng.random() < 0.5:
            sentences.append(_shared(attribute, members, rng))
        else:
            sentences.append(_contrast(attribute, rng.sample(members, 2), rng))
    return _join(sentences, kind.language)


def _shared(attribute: Attribute, members: list[Thing], rng: random.Random) -> str:
    """Say which things have one value in common (two to four of them, or the only one)."""
    value = rng.choice(members).values[attribute.name]
    sharing = [thing for thing in members if thing.values[attribute.name] == value]
    chosen = rng.sample(sharing, min(len(sharing), rng.randint(2, 4)))
    if len(chosen) == 1:
        return _say(rng.choice(attribute.statements), chosen[0].mention, value)
    language = chosen[0].kind.language
    names = COMMA[language].join(thing.mention for thing in chosen[:-1]) + AND[language] + chosen[-1].mention
    return capitalize(rng.choice(attribute.groups).format(names=names, value=value))


def _contrast(attribute: Attribute, pair: list[Thing], rng: random.Random) -> str:
    """Say the same attribute of two things in one sentence."""
    language = pair[0].kind.language
    first, second = (
        _lowered(rng.choice(attribute.statements)).format(name=thing.mention, value=thing.values[attribute.name])
        for thing in pair
    )
    return capitalize(first[:-1] + rng.choice(JOINTS[language]) + second)


def _lessons(seed: int, rng: random.Random) -> Iterator[str]:
    """Yield short documents of skill passages; every lesson goes through all skills once."""
    forbidden = frozenset(question_lists(seed))
    for _ in range(NUM_LESSONS):
        passages = skill_passages(rng, forbidden, AGAIN["en"])
        for start in range(0, len(passages), PASSAGES_PER_LESSON):
            yield _join(passages[start : start + PASSAGES_PER_LESSON], "en")


def _song(things: list[Thing], rng: random.Random) -> str:
    """Return a line of random words and names, said twice."""
    opening, between, ending = rng.choice(REFRAINS)
    words = [rng.choice((rng.choice(things).mention, rng.choice(NUMBERS))) for _ in range(rng.randint(2, 7))]
    line = " ".join(words)
    return opening + line + between + line + ending


def _say(template: str, mention: str, value: str = "") -> str:
    """Fill a sentence and capitalize it, also behind a line feed."""
    filled = template.format(name=mention, value=value)
    return "\n" + capitalize(filled[1:]) if filled.startswith("\n") else capitalize(filled)


def _lowered(template: str) -> str:
    """Return a sentence as it stands in the middle of another; names keep their capitals."""
    return template[:1].lower() + template[1:]


def _join(sentences: list[str], language: str) -> str:
    """Join sentences to a paragraph as the language does; a sentence may bring its own line feed."""
    return ("" if language == "zh" else " ").join(sentences).replace(" \n", "\n")
