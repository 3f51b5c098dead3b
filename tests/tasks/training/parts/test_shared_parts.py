"""Ranks of a machine share the parts on its disk: one drops a part and fetches it again while another one uses it."""

import os
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tasks.training.token_parts import PartCounts, TokenParts, find_parts
from tasks.training.token_table import TokenTable
from tests.object_store import KEYS, Application, serve_bucket
from tests.tasks.training.parts.token_parts import (
    BUCKET,
    CONFIG,
    NUM_PARTS,
    Stored,
    open_lazily,
    store_parts,
    write_parts,
)
from tests.tasks.training.ranks import on_two_ranks

NUM_TURNS = 100


def open_ranks(stored: Stored, folder: Path) -> tuple[TokenTable, list[TokenParts]]:
    """Return a table whose parts are on the disk of another machine, and the parts of two ranks that share one."""
    table = open_lazily(stored.tokens, folder / "other", CONFIG, stored.address)[0]
    return table, [open_rank(number, table, stored.tokens, stored.address, folder / "parts") for number in range(2)]


def open_rank(number: int, table: TokenTable, tokens: Path, address: str, folder: Path) -> TokenParts:
    source = find_parts(tokens / "train.parquet", NUM_PARTS, address)
    return TokenParts(source, folder, table.offsets, table.parts.bounds, group=1, rank=number)


def read_example(parts: TokenParts, table: TokenTable, example: int) -> Any:
    return parts.read("input_ids", int(table.offsets[example]), int(table.offsets[example + 1]))


def first_of(table: TokenTable, part: int) -> int:
    """Return the number of the first example of a part."""
    return int(table.parts.bounds[part])


def list_shared(folder: Path) -> dict[str, set[str]]:
    """Return who uses each part that is on the disk."""
    return {
        made.parent.name: {sign.name for sign in made.parent.glob("used-by-*")}
        for made in (folder / "parts").glob("*/made")
    }


def test_a_part_stays_on_the_disk_until_the_last_rank_lets_go_of_it(stored: Stored, tmp_path: Path) -> None:
    table, (first, second) = open_ranks(stored, tmp_path)
    example = first_of(table, 2)
    stored.traffic.clear()
    expected = np.array(read_example(first, table, example))
    used = read_example(second, table, example)
    assert list_shared(tmp_path) == {"000002": {"used-by-0", "used-by-1"}}
    first.prepare("steps", [3])
    first.prepare("steps", [])
    read_example(second, table, first_of(table, 4))
    assert list_shared(tmp_path)["000002"] == {"used-by-1"}
    assert read_example(first, table, example).tolist() == expected.tolist() == used.tolist()
    assert stored.traffic.requests["000002.parquet"] == 1
    first.close()
    assert list_shared(tmp_path)["000002"] == {"used-by-1"}
    second.close()
    assert not (tmp_path / "parts").exists()
    table.parts.close()


def test_what_a_rank_has_mapped_stays_though_all_let_go_and_one_fetches_it_again(
    stored: Stored, tmp_path: Path
) -> None:
    table, (first, second) = open_ranks(stored, tmp_path)
    examples = range(first_of(table, 2), first_of(table, 3))
    used = [read_example(second, table, example) for example in examples]
    expected = [values.tolist() for values in used]
    stored.traffic.clear()
    for times in range(1, 4):
        second.close() if times == 1 else first.prepare("steps", [])
        assert list_shared(tmp_path) == {}
        first.prepare("steps", [2])
        assert [read_example(first, table, example).tolist() for example in examples] == expected
        assert [values.tolist() for values in used] == expected
        assert stored.traffic.requests["000002.parquet"] == times
    first.close()
    assert [values.tolist() for values in used] == expected
    table.parts.close()


def test_a_rank_that_ends_leaves_the_part_that_another_one_is_fetching(tmp_path: Path) -> None:
    asked, let = threading.Event(), threading.Event()
    with serving_slowly(tmp_path, asked, let) as stored:
        table, (first, second) = open_ranks(stored, tmp_path)
        asked.clear()
        let.clear()
        second.prepare("steps", [7])
        assert asked.wait(20)  # the answer waits
        first.close()
        let.set()
        found = read_example(second, table, first_of(table, 7)).tolist()
        assert list_shared(tmp_path) == {"000007": {"used-by-1"}}
        assert found == read_example(table.parts, table, first_of(table, 7)).tolist()
        second.close()
        table.parts.close()


@contextmanager
def serving_slowly(folder: Path, asked: threading.Event, let: threading.Event) -> Iterator[Stored]:
    """Give parts in a bucket; who gets one waits for a word."""
    let.set()

    def wait(application: Application) -> Application:
        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            if environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(".parquet"):
                asked.set()
                assert let.wait(20)
            return application(environ, start_response)

        return answer

    tokens = write_parts(folder / "stored")
    with serve_bucket(BUCKET, wait) as client:
        yield store_parts(tokens, client)


def take_turns(number: int, stored_at: tuple[Path, str, str], folder: Path) -> tuple[PartCounts, int]:
    """Prepare and read parts at random, as a rank does; return what was fetched, and how many examples were others."""
    tokens, address, endpoint = stored_at
    os.environ.update({**KEYS, "AWS_ENDPOINT_URL": endpoint})
    table = open_lazily(tokens, folder / f"other-{number}", CONFIG, address)[0]
    expected = [read_example(table.parts, table, example).tolist() for example in range(len(table.lengths))]
    parts = open_rank(number, table, tokens, address, folder / "parts")
    draw, wrong = random.Random(number), 0
    for _ in range(NUM_TURNS):
        parts.prepare("steps", draw.sample(range(NUM_PARTS), draw.randrange(3)))
        for example in draw.sample(range(len(table.lengths)), 2):
            wrong += read_example(parts, table, example).tolist() != expected[example]
    parts.close()
    table.parts.close()
    return parts.counts, wrong


def test_ranks_that_drop_and_fetch_parts_at_random_read_what_is_there(stored: Stored, tmp_path: Path) -> None:
    stored_at = stored.tokens, stored.address, os.environ["AWS_ENDPOINT_URL"]
    ranks = on_two_ranks(take_turns, stored_at, tmp_path, folder=tmp_path / "ranks")
    assert [wrong for _, wrong in ranks] == [0, 0]
    # Of the eleven parts with rows; the ranks read all of them once more, for what they compare with.
    fetched = sum(counts.fetched for counts, _ in ranks)
    assert fetched > 2 * 11
    assert sum(stored.traffic.requests.values()) >= fetched + 2 * 11
    assert not (tmp_path / "parts").exists()
