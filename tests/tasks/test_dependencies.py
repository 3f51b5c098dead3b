"""A stage's key follows its imports: each module it reaches counts, and no other does."""

import ast
import shutil
from pathlib import Path

import pytest

from tasks import dependencies
from tasks.dependencies import digest_files, list_files, list_libraries

STAGES = ("ingestion", "tokenization", "evaluation")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for folder in ("tasks", "schemas", "flows"):
        shutil.copytree(dependencies.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_change_in_any_file_that_a_stage_reaches_changes_its_digest_and_no_other_file_does(
    tree: Path, stage: str
) -> None:
    module = f"tasks.{stage}.task"
    reached = list_files(module, tree)
    before = digest_files(module, tree)
    everything = {path for folder in ("tasks", "schemas", "flows") for path in (tree / folder).rglob("*.*")}
    for path in sorted(everything - set(reached)):
        _add_line(path)
    assert digest_files(module, tree) == before
    found = {before}
    for path in reached:
        _add_line(path)
        found.add(digest_files(module, tree))
    assert len(found) == 1 + len(reached) > 35


def test_a_parsing_that_another_thread_disturbed_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    parse, disturbed = ast.parse, [SystemError("AST constructor recursion depth mismatch")] * 2

    def parse_disturbed(source: bytes) -> ast.Module:
        if disturbed:
            raise disturbed.pop()
        return parse(source)

    monkeypatch.setattr(ast, "parse", parse_disturbed)
    assert dependencies._read_imports(b"import json  # read nowhere else") == {"json"}
    monkeypatch.setattr(ast, "parse", lambda source: (_ for _ in ()).throw(SystemError("always")))
    with pytest.raises(SystemError, match="always"):
        dependencies._read_imports(b"import csv  # read nowhere else")


def _add_line(path: Path) -> None:
    with path.open("a") as file:
        file.write("\n# a line\n")


@pytest.mark.parametrize(
    ("stage", "inside", "outside"),
    [
        ("evaluation", "decoder/attention.py", "training/loop.py"),  # imported by evaluation/flat.py
        ("evaluation", "evaluation/report.html.jinja", "ingestion/quality.html.jinja"),
        ("ingestion", "registry/publication.py", "registry/description.py"),
        ("tokenization", "tokenization/chatml.jinja", "evaluation/answers.py"),
    ],
)
def test_what_is_reached_across_stages_counts(stage: str, inside: str, outside: str) -> None:
    files = list_files(f"tasks.{stage}.task")
    assert dependencies.ROOT / "tasks" / inside in files
    assert dependencies.ROOT / "tasks" / outside in (dependencies.ROOT / "tasks").rglob("*.*")
    assert dependencies.ROOT / "tasks" / outside not in files


def test_an_import_inside_a_function_and_a_new_module_count(tree: Path) -> None:
    (tree / "tasks" / "door.py").write_text("def open():\n    from tasks.room import key\n    return key\n")
    (tree / "tasks" / "room.py").write_text("import orjson\nkey = 1\n")
    assert tree / "tasks" / "room.py" in list_files("tasks.door", tree)
    assert "orjson" in list_libraries("tasks.door", tree)


@pytest.mark.parametrize(
    ("stage", "libraries"),
    [
        ("tokenization", {"jinja2", "regex", "tokenizers", "transformers", "polars"}),
        ("evaluation", {"torch", "safetensors", "tokenizers", "sacrebleu", "rouge-score"}),
        ("ingestion", {"datasets", "ftfy", "orjson", "wcwidth", "pyarrow"}),
    ],
)
def test_the_libraries_that_decide_a_result_count_with_their_versions(stage: str, libraries: set[str]) -> None:
    versions = list_libraries(f"tasks.{stage}.task")
    assert libraries <= versions.keys()
    assert not {"prefect", "mlflow"} & versions.keys()
    # What is not there is an option that this machine does not have, or an old Python's.
    assert {name for name, version in versions.items() if version == "absent"} <= {"flash-attn", "tomli", "triton"}


def test_files_are_found_by_hand(tmp_path: Path) -> None:
    texts = {
        "tasks/__init__.py": "",
        "tasks/start.py": "from tasks import near\nimport tasks.room.far\n",
        "tasks/near.py": "A = 1\n",
        "tasks/room/__init__.py": "B = 2\n",
        "tasks/room/far.py": "C = 3\n",
        "tasks/room/page.html": "D",
        "tasks/unused.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {path.relative_to(tmp_path).as_posix() for path in list_files("tasks.start", tmp_path)}
    assert found == set(texts) - {"tasks/unused.py"}
    before = digest_files("tasks.start", tmp_path)
    (tmp_path / "tasks/room/page.html").rename(tmp_path / "tasks/room/pages.html")
    assert digest_files("tasks.start", tmp_path) != before  # the same contents, one of them under another name
