import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.config import DataConfig
from tasks.ingestion.dataset import build_dataset
from tasks.ingestion.quality_page import (
    clip_text,
    count_rows,
    draw_bars,
    state_verdict,
    write_quality_page,
)
from tasks.ingestion.reject_groups import group_rejects
from tasks.ingestion.rows.screening import redact_text
from tests.tasks.ingestion.conftest import WriteLines

MARKUP = "<script>alert('x')</script><img src=x onerror=y>"
# As tokenization writes it, for 18 training conversations of which 2 were rejected, and 2 held-out ones.
HISTOGRAM = {"counts": {"16-31": 4, "64-127": 12}, "min": 20, "median": 80.0, "p90": 100.0, "max": 120}
SIDE: dict[str, Any] = {
    "rejected_samples": [],
    "num_pairs": 0,
    "num_conversations": 18,
    "num_examples": 16,
    "num_truncated": 1,
    "num_literals": 3,
    "num_rendered_anew": 0,
    "total_tokens": 2000,
    "trained_tokens": 500,
    "share_trained": 0.25,
    "share_ending_in_end_of_turn": 1.0,
    "rejected": {"answer_too_long": 2},
    "tokens_per_example": HISTOGRAM,
    "trained_tokens_per_example": HISTOGRAM,
    "samples": [
        [{"text": "<|im_start|>user\nmail ann@acme.org", "trained": False}, {"text": MARKUP, "trained": True}],
    ],
}
MASKS = {
    "train": SIDE,
    "eval": {**SIDE, "rejected": {}},
    "notes": ["The tokenizer's own chat template is used."],
}


@pytest.fixture
def folder(tmp_path: Path, write_lines: WriteLines) -> Path:
    rows: list[Any] = [{"prompt": f"p {number}", "completion": f"c {number} ann@acme.org"} for number in range(20)]
    rows += [rows[0], {"prompt": f"{MARKUP} joe@acme.org", "completion": " "}, {"prompt": "q", "completion": None}, "{"]
    config = DataConfig(source=str(write_lines("rows.jsonl", rows)), max_rejected_fraction=0.5)
    build_dataset(config, seed=0, folder=tmp_path / "out")
    return tmp_path / "out"


def read(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    return quality, [folder / "rejects.parquet"]


class Page(HTMLParser):
    """Elements that are open at each text, and whether every one is closed."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.trained = ""
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += " "
        assert not {name for name, _ in attributes} & {"src", "href", "onerror", "onclick"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] == ["b"]:
            self.trained += data


def parse(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    page.text = re.sub(r"\s+", " ", page.text)
    return page


def test_page_is_whole_and_holds_no_markup_of_the_data_and_nothing_from_outside(folder: Path) -> None:
    path = write_quality_page(folder / "page", *read(folder), MASKS, title=f"rows {MARKUP}")
    assert path == folder / "page" / "quality.html"
    page = parse(path)
    assert page.tags.isdisjoint({"script", "img", "link", "iframe"})
    assert "url(" not in path.read_text(encoding="utf-8")
    assert page.trained.count(MARKUP) == 1


def test_what_turns_the_direction_of_text_is_written_out(folder: Path) -> None:
    turned = "the answer is \u202eyes\u202c"
    masks = {**MASKS, "train": {**SIDE, "samples": [[{"text": turned, "trained": True}]]}, "notes": [turned]}
    quality, rejects = read(folder)
    page = write_quality_page(folder, quality, rejects, masks, title=turned, warnings=[turned]).read_text("utf-8")
    assert not re.findall("[\u202a-\u202e]", page)
    assert page.count(r"the answer is \u202eyes\u202c") == 5  # twice the title


def test_page_says_where_every_row_went_after_tokenization(folder: Path) -> None:
    quality, rejects = read(folder)
    assert count_rows(quality, MASKS) == {"trained": 16, "held out": 2, "duplicates": 1, "leaked": 0, "rejected": 5}
    assert sum(count_rows(quality, None).values()) == quality["counts"]["rows_in"] == 24
    text = parse(write_quality_page(folder, quality, rejects, MASKS, title="rows")).text
    for words in (
        "16 rows are trained and 2 are held out. 5 rows (21 % of those read) are rejected",
        "16 trained (66.7 %)",
        "1 duplicate (4.2 %)",
        "0 leaked ",
        "500 25.0 % of 2,000",
        "1 × empty_answer",
        "an assistant message has neither text nor a tool call",
        "rows.jsonl:22",
        "64–127 12",
        "The tokenizer's own chat template is used.",
    ):
        assert words in text, words


def test_page_without_masks_has_everything_but_tokens(folder: Path) -> None:
    text = parse(write_quality_page(folder, *read(folder), None, title="rows")).text
    assert "18 rows are trained and 2 are held out. 3 rows" in text
    assert "What the model learns" not in text
    assert "tokens an example" not in text
    assert "1 × broken_json" in text


def test_page_shows_no_personal_data_unless_the_screens_are_off(folder: Path) -> None:
    quality, rejects = read(folder)
    shown = parse(write_quality_page(folder, quality, rejects, MASKS, title="rows")).text
    assert "acme.org" not in shown
    assert "mail [EMAIL]" in shown
    assert "E-mail addresses 20 rows.jsonl:1" in re.sub(r", …", "", shown)
    off = copy.deepcopy(quality)
    off["screen"]["mode"] = "off"
    assert "mail ann@acme.org" in parse(write_quality_page(folder, off, rejects, MASKS, title="rows")).text


def test_page_of_a_mixture_has_a_line_for_each_dataset(tmp_path: Path, write_lines: WriteLines) -> None:
    for name in "ab":
        write_lines(f"{name}.jsonl", [{"prompt": f"{name} {number}", "completion": "c"} for number in range(40)])
    config = {"source": str(tmp_path / "a.jsonl"), "weight": 0.5, "mixture": [{"source": str(tmp_path / "b.jsonl")}]}
    build_dataset(DataConfig.model_validate(config), seed=0, folder=tmp_path / "out")
    text = parse(write_quality_page(tmp_path, *read(tmp_path / "out"), None, title="two")).text
    assert "a.jsonl weight 0.5 40 18 4 0 0 0 18 0 b.jsonl all 40 36 4 0 0 0 0 0" in text
    assert "Together 62 rows: 80 read, 18 of them left out by a weight or a limit." in text


def test_verdict_is_good_only_where_nothing_is_to_be_looked_at() -> None:
    rows = {"trained": 9, "held out": 1, "duplicates": 2, "leaked": 0, "rejected": 0}
    assert state_verdict(12, rows, is_noted=False)[0] == "better"
    assert state_verdict(12, rows, is_noted=True)[0] == "mixed"
    assert state_verdict(12, {**rows, "rejected": 1}, is_noted=False)[0] == "mixed"
    assert state_verdict(12, {**rows, "held out": 0}, is_noted=False)[0] == "worse"


def test_page_has_the_warnings_of_both_stages_and_the_broken_budgets(folder: Path) -> None:
    quality, rejects = read(folder)
    assert quality["warnings"]
    told = {"warnings": [f"the template leaves out {MARKUP}"], "problems": ["5 of 24 rows are rejected\n  3 x y"]}
    text = parse(write_quality_page(folder, quality, rejects, MASKS, title="rows", **told)).text
    noted = text.partition("Please note")[2].partition("Where every row went")[0]
    assert all(redact_text(warning) in noted for warning in quality["warnings"])
    assert told["warnings"][0] in noted
    assert "A run would fail 5 of 24 rows are rejected" in text


def test_rejects_are_grouped_the_most_frequent_first_and_the_first_rows_are_kept(tmp_path: Path) -> None:
    for name, reasons in (("a", "baaaa"), ("b", "aca"), ("none", "")):
        rejects = pl.DataFrame({"reason": list(reasons), "line": range(len(reasons))}, schema=["reason", "line"])
        rejects.cast({"reason": pl.String, "line": pl.Int64}).write_parquet(tmp_path / name, row_group_size=2)
    groups = group_rejects(tmp_path / name for name in ("a", "none", "b"))
    assert [(group.reason, group.count, [row["line"] for row in group.rows]) for group in groups] == [
        ("a", 6, [1, 2, 3, 4, 0]),
        ("b", 1, [0]),
        ("c", 1, [1]),
    ]


def test_long_texts_are_cut_and_bars_are_as_high_as_their_count() -> None:
    assert clip_text("x" * 1000) == "x" * 800 + " … (1,000 characters)"
    assert [(bar.label, bar.percent) for bar in draw_bars({"0-15": 2, "16-31": 8})] == [("0–15", 25), ("16–31", 100)]
    assert draw_bars({}) == []
