"""Characters that act and are not seen, written out, so that no row or model moves a terminal or turns a page."""

import re

# C0 without tab and line feed, delete, C1, and the marks that turn the direction of text around.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def make_visible(text: str) -> str:
    """Write control characters as escapes, ESC as backslash x1b: a terminal acts on them (title, clipboard, clear).

    Whatever comes from rows, models or messages goes through here before it goes to the terminal or onto a page.
    """
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
