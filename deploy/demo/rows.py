"""The demo's dataset: question-answer rows in Alpaca form, and a little of the dirt that real files have."""

import json
import random
from pathlib import Path

from deploy.demo.kinds import Fact, capitalize
from deploy.demo.world import SEED, make_facts, make_things

Row = dict[str, str]

NUM_DUPLICATES = 6
"""Exact copies of other training rows."""
NUM_LEAKED = 2
"""Exact copies of held-out rows among the training rows."""
NUM_EMPTY_ANSWERS = 3
NUM_MISSING_FIELDS = 2
NUM_PAIRS = 400
NUM_DUPLICATE_PAIRS, NUM_EQUAL_ANSWERS, NUM_MISSING_ANSWERS = 3, 2, 1
WORDINGS = {"sum": 2, "word.en": 2, "word.zh": 2}
"""In how many wordings training asks each fact of a topic, when not in one: these topics have few facts."""


def make_rows(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Return the training rows (with their dirt) and the held-out rows, both in random order."""
    rng = random.Random(f"{seed}-rows")
    facts = make_facts(seed)
    clean = [row for fact in facts if not fact.held_out for row in _ask(fact, WORDINGS.get(fact.topic, 1), rng)]
    held_out = [(fact, row) for fact in facts if fact.held_out for row in _ask(fact, 1, rng)]
    train = clean + [dict(row) for row in rng.sample(clean, NUM_DUPLICATES)]
    train += [dict(row) for fact, row in held_out if fact.topic == "sum"][:NUM_LEAKED]
    for row in rng.sample(clean, NUM_EMPTY_ANSWERS):
        train.append({**row, "output": rng.choice(("", "   "))})
    for row in rng.sample(clean, NUM_MISSING_FIELDS):
        train.append({"instruction": row["instruction"], "input": row["input"]})
    rng.shuffle(train)
    evaluated = [row for _, row in held_out]
    rng.shuffle(evaluated)
    return train, evaluated


def make_probe(seed: int = SEED) -> list[Row]:
    """Return the beginnings of plain sentences about held-out things, and their ends: what pretraining taught."""
    rows: list[Row] = []
    for thing in make_things(seed):
        for attribute in thing.kind.attributes if thing.held_out else ():
            statement = next(text for text in attribute.statements if text.index("{name}") < text.index("{value}"))
            whole = capitalize(statement.format(name=thing.mention, value=thing.values[attribute.name]))
            start = capitalize(statement.partition("{value}")[0].format(name=thing.mention)).rstrip()
            rows.append({"prompt": start, "completion": whole[len(start) :]})
    return rows


def make_pairs(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Return pairs of answers, to be trained and held out, both in random order; the training ones with their dirt.

    Both answers are true. The chosen one says it as running text does, the rejected one as the dataset taught it.
    """
    rng = random.Random(f"{seed}-pairs")
    train: list[Row] = []
    held_out: list[Row] = []
    for thing in make_things(seed):
        for attribute in thing.kind.attributes:
            statement = next(text for text in attribute.statements if text.index("{name}") < text.index("{value}"))
            value = thing.values[attribute.name]
            question = rng.choice(attribute.questions).format(name=thing.mention, full_name=thing.full_mention)
            pair = {
                "prompt": "\n".join(capitalize(part) for part in question.split("|")),
                "chosen": capitalize(statement.format(name=thing.mention, value=value)),
                "rejected": capitalize(attribute.answer.format(full_name=thing.full_mention, value=value)),
            }
            (held_out if thing.held_out else train).append(pair)
    train = rng.sample(train, NUM_PAIRS)
    train += [dict(pair) for pair in rng.sample(train, NUM_DUPLICATE_PAIRS)]
    train += [{**pair, "rejected": pair["chosen"]} for pair in rng.sample(train, NUM_EQUAL_ANSWERS)]
    for pair in rng.sample(train, NUM_MISSING_ANSWERS):
        train.append({name: pair[name] for name in ("prompt", "chosen")})
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def write_rows(folder: Path, seed: int = SEED) -> tuple[int, int]:
    """Write train.jsonl, heldout.jsonl, probe.jsonl and two files of pairs; return the rows of the first two."""
    train, held_out = make_rows(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(("pairs", "heldout-pairs"), make_pairs(seed), strict=True):
        (folder / f"{name}.jsonl").write_bytes(to_jsonl(pairs))
    (folder / "probe.jsonl").write_bytes(to_jsonl(make_probe(seed)))
    (folder / "train.jsonl").write_bytes(to_jsonl(train))
    (folder / "heldout.jsonl").write_bytes(to_jsonl(held_out))
    return len(train), len(held_out)


def to_jsonl(rows: list[Row]) -> bytes:
    """Return rows as UTF-8 JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _ask(fact: Fact, count: int, rng: random.Random) -> list[Row]:
    """Ask one fact in `count` different wordings."""
    return [
        {"instruction": instruction, "input": extra, "output": fact.answer}
        for instruction, extra in rng.sample(fact.questions, count)
    ]
