"""Further held-out sets: every row is asked or counted, and nothing of them is trained."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import ProbeConfig, TokenizationConfig
from tasks.probing.examples import ProbeError, continue_texts, data_of, make_examples
from tasks.tokenization.templates import prepare_tokenizer

_BASE_MODEL = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "base_model"


def _write(folder: Path, rows: list[dict[str, str]]) -> str:
    (folder / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "probe.jsonl")


def _make(probe: ProbeConfig, trained: set[str], max_length: int = 128) -> Any:
    prepared = prepare_tokenizer(_BASE_MODEL, None)
    config = TokenizationConfig(max_length=max_length)
    return make_examples(probe, data_of(probe), prepared, config, trained, seed=0)


_ROWS = [{"prompt": f"The roofs of Town{n} are", "completion": f" colour{n}."} for n in range(20)]


@pytest.mark.parametrize("as_text", [True, False])
def test_all_rows_are_asked_and_labels_are_the_answer(tmp_path: Path, as_text: bool) -> None:
    probe = ProbeConfig(name="p", source=_write(tmp_path, _ROWS), max_loss=1.0, as_text=as_text)
    made = _make(probe, set())
    tokenizer: Any = prepare_tokenizer(_BASE_MODEL, None).tokenizer
    assert made.examples.height == 20
    assert made.warnings == ()
    for ids, labels, reference in made.examples.select("input_ids", "labels", "reference").iter_rows():
        learned = [label for label in labels if label != -100]
        assert tokenizer.decode(learned) == reference + ("" if as_text else "<|im_end|>")
        prompt = tokenizer.decode(ids[: len(ids) - len(learned)])
        assert prompt.startswith("The roofs" if as_text else "<|im_start|>user\nThe roofs")


def test_rows_that_are_not_asked_are_counted(tmp_path: Path) -> None:
    rows = [*_ROWS, _ROWS[0], {"prompt": "x", "completion": ""}, {"prompt": "long " * 200, "completion": " end"}]
    probe = ProbeConfig(name="p", source=_write(tmp_path, rows), max_loss=1.0, as_text=True)
    first = _make(probe, set())
    trained = set(first.examples["example_id"].head(3))
    made = _make(probe, trained)
    assert made.examples.height == 17
    assert not trained & set(made.examples["example_id"])
    assert made.warnings == (
        "probe p: of 23 rows 1 rejected, 1 duplicates, 1 too long or without an answer to ask for, 3 also trained on "
        "in this run are not asked",
    )


def test_the_first_by_digest_are_asked_and_the_same_ones_each_time(tmp_path: Path) -> None:
    source = _write(tmp_path, _ROWS)
    whole = _make(ProbeConfig(name="p", source=source, max_loss=1.0), set()).examples
    few = _make(ProbeConfig(name="p", source=source, max_loss=1.0, max_examples=5), set()).examples
    assert few["example_id"].to_list() == sorted(whole["example_id"])[:5]


def test_a_probe_without_a_row_says_why(tmp_path: Path) -> None:
    probe = ProbeConfig(name="p", source=_write(tmp_path, _ROWS), max_loss=1.0, as_text=True)
    with pytest.raises(ProbeError, match=r"evaluation.probes p .*: no row is left to ask \(20 too long"):
        _make(probe, set(), max_length=8)


def test_a_token_over_the_border_belongs_to_the_answer() -> None:
    tokenizer: Any = prepare_tokenizer(_BASE_MODEL, None).tokenizer
    messages = json.dumps([{"role": "user", "content": "The tow"}, {"role": "assistant", "content": "n of"}])
    chats = pl.DataFrame({"example_id": ["a" * 16], "messages": [messages]})
    (row,) = continue_texts(chats, tokenizer, 64).to_dicts()
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(row["input_ids"]) == "The town of"
    assert tokenizer.decode(learned) == " town of"
