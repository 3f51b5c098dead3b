"""Personal data and secrets in texts: addresses, phone numbers, tokens, keys, passwords, bank accounts and cards.

Found by shape and check digits alone, and only by shapes that hardly anything else has (see also identifiers.py and
credentials.py). Full-width characters and characters of no width hide nothing. E-mail addresses and phone numbers that
are reserved for examples are passed over. Nothing here proves that a dataset is free of personal data.

Sources of the shapes: RFC 2606 and 6761 (reserved names), ITU-T E.164 (international numbers), the North American and
the Chinese numbering plans, RFC 7468 (private keys), RFC 7519 (JWT), and the prefixes that AWS, GitHub, GitLab, Google,
Hugging Face, npm, OpenAI, Anthropic, PyPI, SendGrid, Slack and Stripe publish for their tokens.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from tasks.ingestion.rows import credentials, identifiers

Screen = Literal["off", "report", "redact"]

KINDS: dict[str, str] = {
    "email": "e-mail addresses",
    "phone": "phone numbers",
    "token": "access tokens or API keys",
    "private_key": "private keys",
    "password": "passwords",
    "iban": "bank account numbers (IBAN)",
    "card": "payment card numbers",
    "ssn": "US social security numbers",
}
PLACEHOLDERS = {kind: f"[{kind.upper()}]" for kind in KINDS}
MIN_CHARACTERS = 6
"""No kind is shorter."""

# A necessary condition of every kind, in the syntax of Rust's regex crate, which knows no look-around: many texts are
# looked through at once, and only those with a match are searched. What is matched is written alike in JSON.
SUSPECT = (
    r"@|PRIVATE KEY|A(?:KIA|SIA)[A-Z2-7]{16}|gh[opusr]_[A-Za-z0-9]{36}|github_pat_|glpat-|xox[abeoprs]-"
    r"|sk-[A-Za-z0-9_-]{20}|[rs]k_(?:live|test)_|hf_[A-Za-z0-9]{34}|AIza|npm_[A-Za-z0-9]{36}|pypi-"
    r"|SG\.[A-Za-z0-9_-]{22}|eyJ[A-Za-z0-9_-]{10}"
    r"|\+[1-9](?:[ .-]?\([0-9]{1,4}\)|[ .-]?[0-9]){7}"
    r"|[2-9][0-9]{2}(?:[.-]|\)[ .-]?)[2-9][0-9]{2}[.-][0-9]{4}"
    r"|1[3-9][0-9](?:[ -][0-9]{4}[ -][0-9]{4}|[0-9]{8})"
    # Characters of no width, and full-width digits, letters and @, which are folded before the search.
    r"|[\x{ad}\x{200b}-\x{200d}\x{2060}\x{feff}\x{ff10}-\x{ff19}\x{ff20}-\x{ff3a}\x{ff41}-\x{ff5a}]"
    rf"|{identifiers.SUSPECT}|{credentials.SUSPECT}"
)
_HIDDEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff\uff10-\uff19\uff20-\uff3a\uff41-\uff5a]")
_NO_WIDTH = frozenset("\u00ad\u200b\u200c\u200d\u2060\ufeff")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])([A-Za-z0-9_%+-]{1,64}(?:\.[A-Za-z0-9_%+-]{1,64}){0,8})"
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24})(?![A-Za-z0-9_-])"
)
_RESERVED_NAMES = re.compile(r"(?:^|\.)(?:example(?:\.(?:com|net|org))?|test|invalid|localhost|local)$")
# pixel densities in file names, as in logo@2x.png
_FILE_ENDINGS = frozenset({"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts", "json", "html"})

# Python's `re` searches fast for a pattern that begins with one set of characters. So the pattern begins with every
# first character of the four forms, and each form then checks its own by a look-behind; what may not stand before a
# number is checked after a match.
_PHONE = re.compile(
    r"[+(1-9](?:"
    r"(?<=\+)[1-9](?:[ .-]?\([0-9]{1,4}\)|[ .-]?[0-9]){7,14}"
    r"|(?:(?<=\()|(?<=1)[ .-]\()[2-9][0-9]{2}\)[ .-]?[2-9][0-9]{2}[.-][0-9]{4}"
    r"|(?:(?<=[2-9])|(?<=1)[ .-][2-9])[0-9]{2}[.-][2-9][0-9]{2}[.-][0-9]{4}"
    r"|(?<=1)[3-9][0-9](?:(?P<gap>[ -])[0-9]{4}(?P=gap)[0-9]{4}|[0-9]{8})"
    r")(?![A-Za-z0-9_%-]|[.,:/][0-9])"
)
_NOT_BEFORE_PHONE = re.compile(r"[A-Za-z0-9_+./#@%&$-]")
_FOUR_DIGITS = re.compile("[0-9]{4}")
# Eleven digits alone may be anything: one of these words must be near.
_PHONE_WORD = re.compile(
    r"电话|手机|联系|致电|拨打|号码|热线|微信|phone|mobile|tel\b|call|whatsapp|cell", re.IGNORECASE
)
PHONE_WORD_REACH = 20
_DECIMAL = re.compile(r"\+[0-9]+\.[0-9]+")
_FICTIONAL = re.compile(r"555.?01[0-9]{2}$|1234567|0{6}")

_TOKEN_HINTS = (
    *("AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-", "sk_", "rk_"),
    *("hf_", "AIza", "npm_", "pypi-", "SG.", "eyJ"),
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"A(?:KIA|SIA)[A-Z2-7]{16}"
    r"|gh[opusr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}|glpat-[A-Za-z0-9_-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,255}"
    r"|sk-(?:ant-|proj-|svcacct-|admin-|or-)?[A-Za-z0-9_-]{20,255}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,255}"
    r"|hf_[A-Za-z0-9]{34,64}|AIza[A-Za-z0-9_-]{35}|npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,255}"
    r"|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"
    r"|eyJ[A-Za-z0-9_-]{10,4096}\.eyJ[A-Za-z0-9_-]{10,16384}\.[A-Za-z0-9_-]{20,2048}"
    r")(?![A-Za-z0-9_-])"
)
# Words that stand in a token's place in documentation.
_NO_TOKEN = re.compile(r"example|your|placeholder|xxxx|-here", re.IGNORECASE)
MIN_TOKEN_VARIETY = 10
"""Different characters that a real token has at least: drops sk-aaaa… and hf_XXXX…"""

_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<what>(?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?)-----(?=[\s\\]*[A-Za-z0-9+/:])"
    r"(?:.{32,16384}?-----END (?P=what)-----|[\sA-Za-z0-9+/=\\]{32,16384})",
    re.DOTALL,
)
_ADDRESS = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,20}://[^\s:/@?#\[\]<>{}\"'$]{0,64}:(?P<password>[^\s/@?\[\]<>{}\"'$]{4,128})@"
)
_NO_PASSWORDS = frozenset({"password", "passwd", "pass", "secret", "mypassword", "yourpassword", "your_password"})


class Span(NamedTuple):
    """A place in a text, and what is there."""

    start: int
    end: int
    kind: str


def may_hold_any(text: str) -> bool:
    """Tell quickly whether a text, or JSON with it, could hold any of the kinds: what is passed over holds none."""
    return (
        "@" in text
        or "+" in text
        or _FOUR_DIGITS.search(text) is not None
        or "PRIVATE KEY" in text
        or any(map(text.__contains__, _TOKEN_HINTS))
        or credentials.HINT.search(text) is not None
        or _HIDDEN.search(text) is not None
    )


def screen_values(value: Any, found: Counter[str], *, redact: bool) -> Any:
    """Look through all texts of a value as JSON has it; keys are names, and are not looked at.

    Args:
        value: messages, tools, or a part of them.
        found: counts by kind, added to.
        redact: return a value with placeholders; else the value itself.
    """
    if isinstance(value, str):
        spans = find_spans(value)
        if not spans:
            return value
        found.update(span.kind for span in spans)
        return _replace(value, spans) if redact else value
    if isinstance(value, list):
        items = [screen_values(item, found, redact=redact) for item in value]
        return items if redact else value
    if isinstance(value, dict):
        entries = {key: screen_values(item, found, redact=redact) for key, item in value.items()}
        return entries if redact else value
    return value


def redact_text(text: str) -> str:
    """Return the text with a placeholder for everything that is found in it."""
    spans = find_spans(text)
    return _replace(text, spans) if spans else text


def find_spans(text: str) -> list[Span]:
    """Return what is found, in order and without overlaps; of two that overlap the more secret one stays."""
    if len(text) < MIN_CHARACTERS:
        return []
    if _HIDDEN.search(text):
        return _find_folded(text)
    spans: list[Span] = []
    for span in _search(text):
        if all(span.end <= other.start or other.end <= span.start for other in spans):
            spans.append(span)
    return sorted(spans)


def _find_folded(text: str) -> list[Span]:
    """Find in the text without characters of no width and in half width; the spans are those of the text itself."""
    places = [place for place, character in enumerate(text) if character not in _NO_WIDTH]
    folded = "".join(text[place] for place in places).translate(_FULL_WIDTH)
    return [Span(places[start], places[end - 1] + 1, kind) for start, end, kind in find_spans(folded)]


def _search(text: str) -> Iterator[Span]:
    """Yield everything found, the most secret kinds first; a cheap look for parts goes before every pattern."""
    if "PRIVATE KEY" in text:
        for match in _PRIVATE_KEY.finditer(text):
            yield Span(*match.span(), "private_key")
    if any(map(text.__contains__, _TOKEN_HINTS)):
        for match in _TOKEN.finditer(text):
            if _is_token(match.group()):
                yield Span(*match.span(), "token")
    if credentials.HINT.search(text):
        yield from map(Span._make, credentials.find_credentials(text))
    if "@" in text:
        if "://" in text:
            for match in _ADDRESS.finditer(text):
                if match["password"].lower() not in _NO_PASSWORDS:
                    yield Span(*match.span("password"), "password")
        for match in _EMAIL.finditer(text):
            if _is_email(match[1], match[2].lower()):
                yield Span(*match.span(), "email")
    if _FOUR_DIGITS.search(text):
        yield from map(Span._make, identifiers.find_identifiers(text))
    if _FOUR_DIGITS.search(text) or "+" in text:
        for match in _PHONE.finditer(text):
            if _is_phone(match, text):
                yield Span(*match.span(), "phone")


def _is_token(text: str) -> bool:
    """Tell a token from a placeholder and from words with hyphens, such as a CSS class sk-folding-cube."""
    return len(set(text)) >= MIN_TOKEN_VARIETY and any(map(str.isdigit, text)) and not _NO_TOKEN.search(text)


def _is_email(local: str, domain: str) -> bool:
    """Tell an address from a reserved one, an SSH address of a repository, and a file name."""
    return local != "git" and not _RESERVED_NAMES.search(domain) and domain.rpartition(".")[2] not in _FILE_ENDINGS


def _is_phone(match: re.Match[str], text: str) -> bool:
    """Tell a number from a part of something longer, a fictional one, a decimal number and any other eleven digits."""
    found = match.group()
    if match.start() and _NOT_BEFORE_PHONE.match(text, match.start() - 1):
        return False
    if _FICTIONAL.search(re.sub("[^0-9]", "", found)):
        return False
    if found.isdigit():
        return bool(_PHONE_WORD.search(text, max(0, match.start() - PHONE_WORD_REACH), match.start()))
    return not _DECIMAL.fullmatch(found)


def _replace(text: str, spans: list[Span]) -> str:
    """Put placeholders in the place of spans, which are in order."""
    parts, end = [], 0
    for span in spans:
        parts += [text[end : span.start], PLACEHOLDERS[span.kind]]
        end = span.end
    return "".join([*parts, text[end:]])
