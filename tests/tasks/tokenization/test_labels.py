"""One function makes labels; the fast way to examples can be taken out and everything is the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from schemas.config import TokenizationConfig
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.fast.encoder import open_fast
from tasks.tokenization.labels import IGNORE_INDEX, Example, make_labels, write_ids
from tasks.tokenization.masking import Conversation, build_examples
from tasks.tokenization.tables import join_examples
from tasks.tokenization.templates import prepare_tokenizer
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import CONVERSATIONS, say
from tests.tasks.tokenization.test_examples import write

_ROOT = Path(__file__).parents[3]


def label(num_tokens: int, *spans: tuple[int, int]) -> list[int]:
    ids = np.arange(10, 10 + num_tokens, dtype=np.int32)
    return make_labels(ids, np.array(spans, np.int64).reshape(-1, 2)).tolist()


def test_labels_are_the_ids_within_the_spans() -> None:
    assert IGNORE_INDEX == -100
    assert label(6, (1, 3), (4, 6)) == [-100, 11, 12, -100, 14, 15]
    assert label(4, (0, 2), (2, 3)) == [10, 11, 12, -100]
    assert label(3) == [-100, -100, -100]
    assert label(0) == []


@pytest.mark.parametrize("spans", [((2, 4), (3, 5)), ((4, 5), (0, 1)), ((1, 1),), ((3, 7),), ((-1, 2),)])
def test_spans_that_overlap_or_lie_outside_are_a_mistake_of_ours(spans: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(AssertionError):
        label(6, *spans)


def test_examples_end_to_end_have_the_labels_of_each() -> None:
    examples = [
        Example(write_ids([1, 2, 3]), ((1, 2), (2, 3))),
        Example(write_ids([4]), ((0, 1),)),
        Example(write_ids([5, 6, 7, 8]), ((1, 3),)),
    ]
    columns = join_examples(examples)
    assert columns.offsets.tolist() == [0, 3, 4, 8]
    assert columns.labels.tolist() == [label for example in examples for label in example.labels]
    assert columns.labels.tolist() == [-100, 2, 3, 4, -100, 6, 7, -100]


def test_labels_of_the_rendered_the_fast_and_the_written_are_made_by_the_one_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a function that labels nothing, nobody has a label: there is no second way to one."""
    tokenizer = make_tokenizer(CHATML)
    messages = say("u:Hello", "a:Hi")
    fast = open_fast(tokenizer, TokenizationConfig())
    assert fast is not None
    made = [*build_examples(messages, tokenizer), *(fast(Conversation(messages)) or [])]
    assert len(made) == 2
    from tasks.tokenization import labels, tables

    def label_nothing(input_ids: np.ndarray, spans: np.ndarray) -> np.ndarray:
        return np.full_like(input_ids, IGNORE_INDEX)

    for module in (labels, tables):
        monkeypatch.setattr(module, "make_labels", label_nothing)
    assert {label for example in made for label in example.labels} == {-100}
    assert set(join_examples(made).labels.tolist()) == {-100}


_TOKENIZE = """
import sys
from pathlib import Path
from schemas.config import TokenizationConfig
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer
model, dataset, folder = map(Path, sys.argv[1:])
tokenize_dataset(dataset, prepare_tokenizer(model, None), folder, TokenizationConfig())
assert not [name for name in sys.modules if name.startswith("tasks.tokenization.fast")]
"""


def test_without_the_fast_way_the_examples_are_the_same(tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(str(tmp_path / "model"))
    plain = [messages for messages, tools in CONVERSATIONS.values() if tools is None]
    dataset = write(tmp_path / "data", [*plain, *plain], [say("u:Hello", "a:Hi")])
    prepared = prepare_tokenizer(tmp_path / "model", None)
    tokenize_dataset(dataset, prepared, tmp_path / "with", TokenizationConfig())
    root = tmp_path / "root"
    for package in ("tasks", "schemas"):
        shutil.copytree(_ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(root / "tasks" / "tokenization" / "fast")
    command = [sys.executable, "-c", _TOKENIZE, *map(str, (tmp_path / "model", dataset, tmp_path / "without"))]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in ("train.parquet", "eval.parquet", "rejects.parquet"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    masks = [json.loads((tmp_path / place / "masks.json").read_text())["train"] for place in ("with", "without")]
    assert [mask["num_checked"] for mask in masks] == [masks[0]["num_checked"], 0]
    assert masks[0]["num_checked"] > 0
