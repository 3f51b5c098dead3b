"""Secrets that are recognized by the words before them: `"password": "…"`, cloud keys, bearer tokens, webhooks."""

import re
from collections.abc import Iterator

Found = tuple[int, int, str]

_PASSWORD_NAMES = r"password|passwd|passphrase|pwd"
_SECRET_NAMES = r"client[_-]?secret|secret|api[_-]?key|access[_-]?token|auth[_-]?token|account[_-]?key"
SUSPECT = (
    r"hooks\.slack\.com/|(?i:bearer)[ \t]+[A-Za-z0-9._~+/-]{20}|AccountKey=|(?i:secret[_ .-]?(?:access[_ .-]?)?key)"
    rf"|(?i:{_PASSWORD_NAMES}|{_SECRET_NAMES})\\?[\"']?[ \t]{{0,3}}[:=][ \t]{{0,3}}\\?[\"']"
)
"""What every one of them has, in the syntax of Rust's regex crate; quotes as JSON writes them."""
HINT = re.compile(r"hooks\.slack|bearer|accountkey|secret|passw|passphrase|pwd|api[_-]?key|token", re.IGNORECASE)

_WEBHOOK = re.compile(r"https://hooks\.slack\.com/(?:services|workflows)/T\w{6,14}/[AB]\w{6,14}/[A-Za-z0-9/]{16,60}")
_BEARER = re.compile(r"\bbearer[ \t]+([A-Za-z0-9._~+/-]{20,4096}={0,2})", re.IGNORECASE)
_AZURE = re.compile(r"AccountKey=([A-Za-z0-9+/]{86}==)")
_AWS = re.compile(
    r"secret[_ .-]?(?:access[_ .-]?)?key\W{0,3}?(?:[ \t]*(?:[:=]|is)[ \t]*)[\"']?([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    rf"(?:(?P<password>{_PASSWORD_NAMES})|{_SECRET_NAMES})[\"']?[ \t]{{0,3}}[:=][ \t]{{0,3}}([\"'])"
    r"(?P<value>[^\"'\s\\]{6,256})\2",
    re.IGNORECASE,
)
# Words and signs that stand in a secret's place in documentation and code.
_PLACEHOLDER = re.compile(
    r"example|placeholder|your|my[_-]?(?:pass|secret)|change.?me|redacted|dummy|\.\.\.|xxxx|\*\*\*|-here|[<>{}$%\[\]()]",
    re.IGNORECASE,
)
MIN_SECRET_VARIETY = 5
"""Different characters of a secret at least: drops 111111 and aaaaaa1."""
MIN_KEY_CHARACTERS = 16
"""Of a key or token that is told by its name alone."""


def find_credentials(text: str) -> Iterator[Found]:
    """Yield start, end and kind (token, password) of each secret."""
    for match in _WEBHOOK.finditer(text):
        yield *match.span(), "token"
    for pattern in (_AZURE, _AWS, _BEARER):
        for match in pattern.finditer(text):
            if _is_secret(match[1]) and any(map(str.isdigit, match[1])):
                yield *match.span(1), "token"
    for match in _ASSIGNED.finditer(text):
        value = match["value"]
        kind = "password" if match["password"] else "token"
        is_long = kind == "password" or len(value) >= MIN_KEY_CHARACTERS
        if is_long and _is_secret(value) and not value.isalpha() and not value.isdigit():
            yield *match.span("value"), kind


def _is_secret(value: str) -> bool:
    """Tell a secret from a placeholder."""
    return len(set(value)) >= MIN_SECRET_VARIETY and not _PLACEHOLDER.search(value)
