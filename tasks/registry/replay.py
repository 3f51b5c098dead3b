"""The replay: training rows, asked of the logged model as chat requests, have to give the prompt ids of training.

The model's own code answers, with its own tokenizer and settings, and without its weights.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import mlflow.artifacts
import mlflow.pyfunc
import polars as pl
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from tasks import tracking
from tasks.partitions import list_row_groups

NUM_REPLAYED = 32
_MOST_ROW_GROUPS = 4
_MOST_NAMED = 3

T = TypeVar("T")


class ReplayError(ValueError):
    """The logged model sees other prompts than the training did; it is not registered."""


class Replay(NamedTuple):
    """How many examples were asked again."""

    num_equal: int
    num_cut: int
    """Left out, because their prompt or answer was cut for length."""


class _Trained(NamedTuple):
    """A training example: all its ids, and where its answers begin."""

    example_id: str
    input_ids: list[int]
    starts: list[int]
    """0 where the prompt is trained too, so that the border is not known."""
    part: int
    """Number of the part of the table that it is in; its conversation is in that of the dataset."""


def fetch_logged(uri: str, weights: Path, folder: Path) -> Path:
    """Lay a logged model out in a folder, its model files as they lie on this machine; return the folder.

    Args:
        uri: `models:/m-…`.
        weights: the folder of its model files.
        folder: gets the rest, as it is in the store; empty.
    """
    location = tracking.client().get_logged_model(uri.removeprefix("models:/")).artifact_location
    for place in (location, f"{location}/artifacts"):
        target = folder / place.removeprefix(location).strip("/")
        target.mkdir(exist_ok=True)
        for item in mlflow.artifacts.list_artifacts(place):
            if not item.is_dir:
                mlflow.artifacts.download_artifacts(f"{place}/{Path(item.path).name}", dst_path=str(target))
    (folder / tracking.MODEL_SUBFOLDER).symlink_to(weights)
    return folder


ReadParts = Callable[[Sequence[int]], Iterable[Path]]
"""Gives the files of a table, those of some numbers first, each of them perhaps for that time only."""


def replay_rows(
    model: Path, read_rows: ReadParts, read_examples: ReadParts, num_parts: int, masks_file: Path
) -> Replay:
    """Ask a logged model for the prompts of some training rows, and compare.

    Args:
        model: the folder of the MLflow model, with its MLmodel file.
        read_rows: of train.parquet of the dataset.
        read_examples: of train.parquet of the tokens, whose parts have the same rows.
        num_parts: of the tokens.
        masks_file: masks.json of the tokens.

    Raises:
        ReplayError: a prompt differs, or a request is refused.
    """
    loaded = mlflow.pyfunc.load_model(str(model), model_config={"weights": False})
    masks = json.loads(masks_file.read_text(encoding="utf-8"))
    examples = list(_choose_examples(read_examples, num_parts))
    numbers = sorted({example.part for example in examples})
    conversations = _read_conversations(read_rows(numbers), {example.example_id for example in examples})
    differences, num_equal, num_cut = [], 0, 0
    for example in examples:
        place, messages, tools = conversations[example.example_id]
        prompts = list(_ask(loaded, messages, tools))
        missing = [start for start in example.starts if not _is_asked(example.input_ids, start, prompts)]
        if not missing:
            num_equal += 1
        elif any(isinstance(prompt, list) and _is_cut(prompt, example, masks["max_length"]) for prompt in prompts):
            num_cut += 1
        else:
            differences.append(f"{place}: {_describe(prompts, example.input_ids[: missing[0]])}")
    if differences:
        named = "; ".join(differences[:_MOST_NAMED])
        raise ReplayError(
            f"asked {len(examples)} training rows as chat requests, the logged model sees other prompts than the "
            f"training did for {len(differences)} of them ({named}), so that no version is registered: set "
            "model.chat_template to a template that writes the same whenever it is asked, such as chatml"
        )
    return Replay(num_equal, num_cut)


def _choose_examples(read_parts: ReadParts, num_parts: int) -> Iterator[_Trained]:
    """Yield examples evenly over the table, from few row groups of few parts; of several of one conversation any."""
    numbers = _spread(range(num_parts), _MOST_ROW_GROUPS)
    for number, part in zip(numbers, read_parts(numbers), strict=False):  # what comes after them is not read
        groups = [group for group in list_row_groups(part) if group.num_rows]
        chosen = _spread(groups, max(1, _MOST_ROW_GROUPS // len(numbers)))
        for group in chosen:
            columns = ["example_id", "input_ids", "labels"]
            frame = pl.DataFrame(pq.ParquetFile(group.part).read_row_group(group.number, columns=columns))
            each = max(1, math.ceil(frame.height * len(chosen) * len(numbers) / NUM_REPLAYED))
            for example_id, input_ids, labels in frame.gather_every(each).rows():
                starts = [at for at, label in enumerate(labels) if label >= 0 and (at == 0 or labels[at - 1] < 0)]
                yield _Trained(example_id, input_ids, starts, number)


def _spread(among: Sequence[T], most: int) -> Sequence[T]:
    """Return at most so many, evenly over all."""
    return among[:: max(1, len(among) // most)][:most]


def _read_conversations(
    parts: Iterable[Path], example_ids: Set[str]
) -> dict[str, tuple[str, list[Any], list[Any] | None]]:
    """Return place, messages and tools of conversations by their id; files are read until all are found."""
    columns = ["example_id", "source", "line", "messages", "tools"]
    found: dict[str, tuple[str, list[Any], list[Any] | None]] = {}
    for part in parts:
        rows = pl.scan_parquet(part).select(columns).filter(pl.col("example_id").is_in(list(example_ids))).collect()
        for example_id, source, line, messages, tools in rows.rows():
            place = f"{Path(source).name}, line {line}"
            found[example_id] = place, json.loads(messages), json.loads(tools) if tools else None
        if found.keys() >= example_ids:
            break
    return found


def _ask(loaded: Any, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> Iterator[list[int] | str]:
    """Yield the prompt's ids before each answer of the assistant, or what refused the request."""
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        request = {"messages": list(messages[:number]), **({"tools": tools} if tools else {})}
        try:
            yield list(loaded.predict(request)["prompt_token_ids"])
        except Exception as error:
            yield f"the request is refused: {type(error).__name__}: {error}"


def _is_asked(input_ids: list[int], start: int, prompts: Sequence[list[int] | str]) -> bool:
    """Tell whether the ids before an answer are one of the prompts."""
    return any(isinstance(prompt, list) and prompt == input_ids[: start or len(prompt)] for prompt in prompts)


def _is_cut(prompt: list[int], example: _Trained, max_length: int) -> bool:
    return len(prompt) + len(example.input_ids) - example.starts[0] > max_length


def _describe(prompts: Sequence[list[int] | str], trained: list[int]) -> str:
    """Say how the nearest prompt differs from that of the training."""
    refused = next((prompt for prompt in prompts if isinstance(prompt, str)), None)
    if refused is not None:
        return refused[:300]
    known = [prompt for prompt in prompts if isinstance(prompt, list)]
    nearest = min(known, key=lambda prompt: abs(len(prompt) - len(trained)), default=[])
    pairs = zip(nearest, trained, strict=False)
    place = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(nearest), len(trained)))
    return f"{len(nearest)} tokens in place of {len(trained)}, the first different one at position {place}"
