"""Numbers that name a person or an account: bank accounts, payment cards and social security numbers.

Each is checked by its own check digits or ranges: ISO 13616 (IBAN, mod 97, length by country), ISO/IEC 7812 (cards,
Luhn, issuers' prefixes), and the ranges that the US Social Security Administration never assigns.
"""

import re
from collections.abc import Iterator

Found = tuple[int, int, str]

SUSPECT = (
    r"[A-Z]{2}[0-9]{2}[ -]?[A-Z0-9]{4}[ -]?[A-Z0-9]{4}|[2-6][0-9]{3}(?:[ -]?[0-9]{4}[ -]?[0-9]{4}|[ -]?[0-9]{6})"
    r"|[0-9]{3}-[0-9]{2}-[0-9]{4}"
)
"""What every one of them has, in the syntax of Rust's regex crate."""

# The most used countries; of another one no number is looked for.
_IBAN_LENGTHS: dict[str, str] = dict(
    re.findall(
        "([A-Z]{2})([0-9]{2})",
        "AD24 AE23 AT20 BA20 BE16 BG22 BH22 BR29 CH21 CY28 CZ24 DE22 DK18 EE20 ES24 FI18 FR27 GB22 GE22 GR27 HR21 HU28 "
        "IE22 IL23 IS26 IT27 KW30 KZ20 LB28 LI21 LT20 LU20 LV21 MC27 MD24 ME22 MK19 MT31 NL18 NO15 PK24 PL28 PT25 QA29 "
        "RO24 RS22 SA24 SE24 SI19 SK24 SM27 TN24 TR26 UA29",
    )
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Z]{2})[0-9]{2}(?=[ -]?[A-Z0-9]{4})")
_CARD = re.compile(
    r"(?<![A-Za-z0-9_.#/-])[2-6][0-9]{3}(?:([ -]?)[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|([ -]?)[0-9]{6}\2[0-9]{5})"
)
_AFTER_CARD = re.compile(r"[A-Za-z0-9_]|[.-][0-9]")
_SSN = re.compile(
    r"(?<![A-Za-z0-9_./+-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![A-Za-z0-9_/-]|\.[0-9])"
)


def find_identifiers(text: str) -> Iterator[Found]:
    """Yield start, end and kind (iban, card, ssn) of each number."""
    for match in _IBAN.finditer(text):
        end = _end_iban(text, match.start(), int(_IBAN_LENGTHS.get(match[1], 0)))
        if end is not None:
            yield match.start(), end, "iban"
    for match in _CARD.finditer(text):
        digits = re.sub("[ -]", "", match.group())
        if not _AFTER_CARD.match(text, match.end()) and _is_card(digits):
            yield *match.span(), "card"
    for match in _SSN.finditer(text):
        yield *match.span(), "ssn"


def _end_iban(text: str, start: int, length: int) -> int | None:
    """Return where a bank account number of so many characters ends, spaces and hyphens between groups left out."""
    place, characters = start, ""
    while place < len(text) and len(characters) < length:
        if text[place] not in " -":
            characters += text[place]
        elif text[place - 1] in " -":
            return None
        place += 1
    is_whole = len(characters) == length > 0 and characters.isascii() and characters.isalnum()
    if not is_whole or characters != characters.upper() or (place < len(text) and text[place].isalnum()):
        return None
    return place if int("".join(str(int(c, 36)) for c in characters[4:] + characters[:4])) % 97 == 1 else None


def _is_card(digits: str) -> bool:
    """Tell a payment card by its issuer's prefix and length, and by Luhn's check digit."""
    size, two, four = len(digits), int(digits[:2]), int(digits[:4])
    known = (
        (digits[0] == "4" and size in (13, 16, 19))
        or ((51 <= two <= 55 or 2221 <= four <= 2720) and size == 16)
        or (two in (34, 37) and size == 15)
        or ((two == 65 or four == 6011) and size == 16)
        or (two == 62 and 16 <= size <= 19)
        or (3528 <= four <= 3589 and size == 16)
    )
    return known and len(set(digits)) > 1 and passes_luhn(digits)


def passes_luhn(digits: str) -> bool:
    """Tell whether the last digit is the check digit of the others (Luhn)."""
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 * (value > 9) for value in doubled) % 10 == 0
