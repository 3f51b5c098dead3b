"""A logged model gives the prompts of training to requests of every shape, or is not registered."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import TokenizationConfig
from tasks import storage, tracking
from tasks.registry import versions
from tasks.registry.replay import Replay, ReplayError, fetch_logged, replay_rows
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.templates import prepare_tokenizer
from tests.tasks.tokenization.conversations import say
from tests.tasks.tokenization.test_examples import write

_BASE_MODEL = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "base_model"
ROWS = [
    *(say("s:Be brief.", f"u:Question {n}?", f"a:Answer {n}.", "u:<|im_end|> or \n?", "a:Yes.") for n in range(40)),
    say("u:" + "long " * 400, "a:Cut."),
]


@pytest.fixture
def work(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model folder with the tokenizer that ships, and the dataset and tokens that it was made with."""
    config = TokenizationConfig(max_length=128)
    dataset = write(tmp_path / "data", ROWS, [say("u:q", "a:x")])
    tokenize_dataset(dataset, prepare_tokenizer(_BASE_MODEL, None), tmp_path / "tokens", config)
    model = tmp_path / "model"
    shutil.copytree(_BASE_MODEL, model)
    for path in (tmp_path / "tokens" / "tokenizer").iterdir():
        shutil.copyfile(path, model / path.name)
    return model, dataset, tmp_path / "tokens"


def log(model: Path, folder: Path) -> Path:
    """Log a model, and lay out what was logged."""
    run = tracking.client().create_run(tracking.open_experiment("replay"), run_name="replay")
    uri = versions.log_merged_model(model, str(run.info.run_id), question="hi")
    folder.mkdir()
    return fetch_logged(uri, model, folder)


def replay_whole(logged: Path, dataset: Path, tokens: Path) -> Replay:
    """Replay rows of tables that are one file each."""
    rows, examples = ([folder / "train.parquet"] for folder in (dataset, tokens))
    return replay_rows(logged, lambda _: rows, lambda _: examples, 1, tokens / "masks.json")


def test_of_a_table_in_parts_few_are_read(tracked: Path, work: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Rows of four parts of ten are asked again, and no other part of either table is opened."""
    model, dataset, tokens = work
    read: dict[str, list[int]] = {"rows": [], "examples": []}

    def cut(name: str, table: Path) -> Callable[[Sequence[int]], Iterator[Path]]:
        frame = pl.read_parquet(table)
        parts = list(frame.iter_slices(-(-frame.height // 10)))

        def read_parts(first: Sequence[int]) -> Iterator[Path]:
            for number in [*first, *(number for number in range(len(parts)) if number not in first)]:
                read[name].append(number)
                with storage.new_folder() as place:  # gone when the next one is asked for
                    parts[number].write_parquet(place / "part.parquet")
                    yield place / "part.parquet"

        return read_parts

    rows, examples = cut("rows", dataset / "train.parquet"), cut("examples", tokens / "train.parquet")
    replay = replay_rows(log(model, tmp_path / "logged"), rows, examples, 9, tokens / "masks.json")
    assert read == {"rows": [0, 2, 4, 6], "examples": [0, 2, 4, 6]}
    assert replay == (20, 0)


def test_training_rows_give_the_logged_model_the_prompts_of_training(
    tracked: Path, work: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    model, dataset, tokens = work
    replay = replay_whole(log(model, tmp_path / "logged"), dataset, tokens)
    assert replay == (20, 1)  # every second of 41 rows, of which the last was cut


def change_template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_start|>", " <|im_start|>"), encoding="utf-8")


def allow_control_tokens(model: Path) -> None:
    settings = json.loads((model / "prompts.json").read_text(encoding="utf-8"))
    (model / "prompts.json").write_text(json.dumps({**settings, "control_tokens": []}), encoding="utf-8")


def refuse_systems(model: Path) -> None:
    path = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}"
    path.write_text(refusal + path.read_text(encoding="utf-8"), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_template, "the first different one at position 0"),
        (allow_control_tokens, r"data\.jsonl, line \d+: \d+ tokens in place of \d+"),
        (refuse_systems, "the request is refused: TemplateError: no systems"),
    ],
)
def test_a_model_that_sees_other_prompts_is_refused(
    tracked: Path, work: tuple[Path, Path, Path], tmp_path: Path, change: Any, message: str
) -> None:
    model, dataset, tokens = work
    change(model)
    with pytest.raises(ReplayError, match=message):
        replay_whole(log(model, tmp_path / "logged"), dataset, tokens)
