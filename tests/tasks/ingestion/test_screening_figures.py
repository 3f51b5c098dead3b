"""Recall and false alarms of the screens on a labelled set that is made here, kind by kind."""

import json
import random
import string
from collections import Counter

import polars as pl
import pytest

from tasks.ingestion.rows.identifiers import passes_luhn
from tasks.ingestion.rows.screening import SUSPECT, find_spans, may_hold_any, redact_text

NUM_EACH = 200
FRAMES = ("{}", "It is {}, as agreed.", "用户：{}。", "(see {})", "a\n{}\nb", "1. {} 2. none")


def _draw(draw: random.Random, alphabet: str, size: int) -> str:
    return "".join(draw.choices(alphabet, k=size))


def _close(digits: str) -> str:
    """Append the check digit of Luhn."""
    return next(digits + str(last) for last in range(10) if passes_luhn(digits + str(last)))


def _card(draw: random.Random) -> str:
    prefix, size = draw.choice((("4", 16), ("53", 16), ("37", 15), ("6011", 16), ("2221", 16)))
    number = _close(prefix + _draw(draw, string.digits, size - len(prefix) - 1))
    gap = draw.choice(("", " ", "-"))
    groups = (number[:4], number[4:10], number[10:]) if size == 15 else tuple(number[n : n + 4] for n in (0, 4, 8, 12))
    return gap.join(groups)


def _iban(draw: random.Random) -> str:
    country, size = draw.choice((("DE", 22), ("FR", 27), ("NL", 18), ("ES", 24)))
    account = _draw(draw, string.digits, size - 4)
    checked = 98 - int("".join(str(int(letter, 36)) for letter in f"{account}{country}00")) % 97
    number = f"{country}{checked:02}{account}"
    return " ".join(number[n : n + 4] for n in range(0, size, 4)) if draw.random() < 0.5 else number


def _secret(draw: random.Random, size: int, signs: str = "") -> str:
    return _draw(draw, string.ascii_letters, size - 5 - len(signs)) + signs + _draw(draw, string.digits, 5)


def _hide(draw: random.Random, text: str) -> str:
    """Write a text in full width, or with characters of no width in it."""
    if draw.random() < 0.5:
        return "".join(chr(ord(c) + 0xFEE0) if c.isalnum() or c == "@" else c for c in text)
    return "\u200b".join(text)


def make(kind: str, draw: random.Random) -> str:
    """Return a text with one thing of a kind in it, and nothing else."""
    letters = string.ascii_letters + string.digits
    return {
        "card": lambda: _card(draw),
        "iban": lambda: _iban(draw),
        "ssn": lambda: f"{draw.randint(1, 665):03}-{draw.randint(1, 99):02}-{draw.randint(1, 9999):04}",
        "aws": lambda: f"aws_secret_access_key = {_secret(draw, 40, '/+')}",
        "azure": lambda: f"AccountName=a;AccountKey={_secret(draw, 86)}==;EndpointSuffix=core",
        "webhook": lambda: (
            f"https://hooks.slack.com/services/T{_draw(draw, 'ABC123', 10)}/B{_draw(draw, 'ABC123', 10)}/"
            f"{_draw(draw, letters, 24)}"
        ),
        "bearer": lambda: f"Authorization: Bearer {_secret(draw, 40, '.-_')}",
        "password": lambda: f'{{"password": "{_secret(draw, 12, "!")}"}}',
        "api_key": lambda: f"api_key = '{_secret(draw, 32)}'",
        "address": lambda: f"postgres://user:{_secret(draw, 10, '#')}@db.acme.org/x",
        "hidden_email": lambda: _hide(draw, f"ann{draw.randint(1, 999)}@acme.org"),
        "hidden_phone": lambda: _hide(draw, f"+4930{draw.randint(1000000, 9999999)}"),
    }[kind]()  # fmt: skip


FOUND_AS = {
    **{kind: kind for kind in ("card", "iban", "ssn", "password")},
    **dict.fromkeys(("aws", "azure", "webhook", "bearer", "api_key"), "token"),
    "address": "password",
    "hidden_email": "email",
    "hidden_phone": "phone",
}


@pytest.mark.parametrize("kind", FOUND_AS)
def test_all_of_a_kind_is_found_and_replaced(kind: str) -> None:
    draw = random.Random(kind)
    texts = [draw.choice(FRAMES).format(make(kind, draw)) for _ in range(NUM_EACH)]
    found = [Counter(span.kind for span in find_spans(text)) for text in texts]
    missed = [text for text, kinds in zip(texts, found, strict=True) if kinds[FOUND_AS[kind]] != 1]
    assert len(missed) <= 0.01 * NUM_EACH, missed[:3]
    assert not [text for text in map(redact_text, texts) if find_spans(text)]
    # As messages are written: ingestion looks through many of them at once for what could be one.
    written = pl.Series([json.dumps(text, ensure_ascii=False) for text in texts])
    holding = pl.Series([bool(kinds) for kinds in found])
    assert (written.str.contains(SUSPECT) | ~holding).all()
    assert all(map(may_hold_any, texts))


def ordinary(draw: random.Random) -> str:
    """Return a text that looks a little like one of the kinds and is none."""
    hexadecimal = string.hexdigits.lower()[:16]
    number = _draw(draw, "123456789", 15)
    wrong = number + str((int(_close(number)[-1]) + draw.randint(1, 9)) % 10)
    choices = (
        f"4{wrong[1:]}" if not passes_luhn(f"4{wrong[1:]}") else "order 12",
        f"commit {_draw(draw, hexadecimal, 40)}",
        f"sha256:{_draw(draw, hexadecimal, 64)}",
        f"id {_draw(draw, hexadecimal, 8)}-{_draw(draw, hexadecimal, 4)}-4{_draw(draw, hexadecimal, 3)}",
        f"DE{draw.randint(10, 99)} 1234 5678 1234 5678 {draw.randint(10, 99)}"
        if draw.random() < 0.02
        else "DE12 is a room",
        f"on 20{draw.randint(10, 29)}-{draw.randint(10, 12)}-{draw.randint(10, 28)}",
        f"version 3.{draw.randint(0, 99)}.{draw.randint(0, 9999)}",
        f"ISBN 978-{draw.randint(0, 9)}-{draw.randint(10, 99)}-{draw.randint(100000, 999999)}-{draw.randint(0, 9)}",
        "the bearer of bad news arrives at midnight tomorrow",
        'password = input("password: ")',
        '{"password": "<your password>"}',
        '"password": "${DB_PASSWORD}"',
        "api_key = 'YOUR_API_KEY_GOES_HERE_12345'",
        'token = "user"',
        "the secret key is under the mat",
        f"000-{draw.randint(10, 99)}-{draw.randint(1000, 9999)} and 9{draw.randint(10, 99)}-12-3456",
        f"x = {_draw(draw, string.digits, 20)}",
        f"<img src='data:image/png;base64,{_draw(draw, string.ascii_letters, 120)}'>",
        "价格：１２３４５元，共３件",
        "👩\u200d👩\u200d👧 are a family",
    )
    return draw.choice(choices)


def test_ordinary_texts_raise_few_alarms() -> None:
    draw = random.Random(3)
    texts = [draw.choice(FRAMES).format(ordinary(draw)) for _ in range(4000)]
    alarms = [(text, find_spans(text)) for text in texts if find_spans(text)]
    assert len(alarms) <= 0.005 * len(texts), alarms[:5]


def test_known_numbers_are_told_by_their_check_digits() -> None:
    assert [span.kind for span in find_spans("GB82 WEST 1234 5698 7654 32 IS MINE")] == ["iban"]
    assert find_spans("GB83 WEST 1234 5698 7654 32") == []
    assert [span.kind for span in find_spans("pay with 4111 1111 1111 1111 now")] == ["card"]
    assert find_spans("pay with 4111 1111 1111 1112 now") == []
    assert redact_text("my ssn: 123-45-6789.") == "my ssn: [SSN]."
    assert redact_text("mail ａｎｎ＠ａｃｍｅ．ｏｒｇ today") == "mail [EMAIL] today"
