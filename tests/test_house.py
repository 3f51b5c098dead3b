"""Rules of the house that no linter knows."""

import ast
import re
from collections import defaultdict
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def test_a_class_name_exists_once() -> None:
    places = defaultdict(list)
    for package in ("flows", "tasks", "schemas", "deploy"):
        for file in (_ROOT / package).rglob("*.py"):
            module = ast.parse(file.read_text(encoding="utf-8"))
            # Only those of a module's top level: pandera wants a nested class `Config` in each of its models.
            for node in module.body:
                if isinstance(node, ast.ClassDef):
                    places[node.name].append(str(file.relative_to(_ROOT)))
    assert len(places) > 100
    twice = {name: files for name, files in places.items() if len(files) > 1}
    assert not twice


def test_questions_of_contributing_are_answered_in_at_most_three_files_and_these_exist() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    questions = text.split("## Where is it?")[1].split("## Where is one added?")[0]
    answers = [re.findall(r"`((?:tasks|schemas)/[\w/.]+)`", line) for line in questions.splitlines() if "?" in line]
    assert len(answers) == 10
    assert all(1 <= len(files) <= 3 for files in answers)
    named = set(re.findall(r"`((?:tasks|schemas|flows|tests)/[\w/]+\.py)`", text))
    assert not {name for name in named if not (_ROOT / name).is_file()}


def test_each_promise_of_the_readme_is_linked_to_the_tests_that_hold_it() -> None:
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    promises = " ".join(text[text.index("What it will not do") : text.index("**For whom.**")].split())
    links = re.findall(r"\[([^]]+)\]\((tests/[^)]+)\)", promises)
    assert [words for words, _ in links] == [
        *("lose a row", "why", "learn your prompts", "forget the end of turn", "register a merged model that differs"),
        *("call a model better", "a confidence interval"),
    ]
    assert all("\ndef test_" in (_ROOT / path).read_text(encoding="utf-8") for _, path in links)
