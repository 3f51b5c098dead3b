"""What looks wrong in texts that are kept: reported, never repaired."""

import re

import ftfy

TEXT_PROBLEMS: dict[str, str] = {
    "control_characters": "control characters (other than tab, line feed and carriage return) are in the text",
    "replacement_characters": "U+FFFD is in the text: an earlier decoding lost characters",
    "mojibake": "the text looks like UTF-8 that was decoded as another encoding (ftfy would repair it)",
    "placeholders": "a placeholder such as {{name}} was left in the text: fill it in, or the model learns to write it",
}
PLACEHOLDER = re.compile(r"\{\{ ?[A-Za-z_][\w. -]{0,60} ?\}\}")
# C0 without tab, line feed and carriage return; delete; C1.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# ftfy's pattern without its spaces and comments, and with any character for \s, \w and ^, which Rust takes otherwise.
_BADNESS = re.sub(r"\\[sw]|\^(?=\[)", "(?s:.?)", re.sub(r"(\[[^\]]*\])|#.*|\s", r"\1", ftfy.badness.BADNESS_RE.pattern))
# A necessary condition of every problem in the syntax of Rust's regex crate, for messages as JSON: C0 is escaped.
ODD = rf"\{{\{{ ?[A-Za-z_]|\\(?:u00|[bf])|[\x7f-\x{{9f}}\x{{fffd}}]|{_BADNESS}"


def find_text_problems(text: str) -> tuple[str, ...]:
    """Return the codes of TEXT_PROBLEMS that hold for the text."""
    problems = ["control_characters"] if CONTROL.search(text) else []
    if "{{" in text and PLACEHOLDER.search(text):
        problems.append("placeholders")
    if not text.isascii():
        if "\ufffd" in text:
            problems.append("replacement_characters")
        if ftfy.badness.is_bad(text) and ftfy.fix_encoding(text) != text:
            problems.append("mojibake")
    return tuple(problems)
