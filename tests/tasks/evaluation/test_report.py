import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from schemas.artifacts import Delta, ProbeReport
from schemas.config import EvaluationConfig, GateConfig
from tasks.evaluation.champion import compare_with_champion
from tasks.evaluation.comparison import Comparison, compare
from tasks.evaluation.gate import judge as judge_gate
from tasks.evaluation.report import MAX_TEXT, clip_text, write_report
from tasks.evaluation.verdict import format_change, format_value, judge, list_caveats, state_verdict

PNG = b"\x89PNG\r\n\x1a\n"


def make_rows(exact: Sequence[int], *, nll: float = 1.0, answers: Sequence[str] | None = None) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "example_id": [f"{at:016x}" for at in range(len(exact))],
            "question": [f"question {at}" for at in range(len(exact))],
            "reference": ["yes"] * len(exact),
            "answer": list(answers or ["yes" if right else "no" for right in exact]),
            "nll_sum": [4 * nll] * len(exact),
            "num_tokens": [4] * len(exact),
            "exact_match": [float(right) for right in exact],
            "rouge_l": [float(right) for right in exact],
            "chrf": [100.0 * right for right in exact],
            "repetition_rate": [0.0] * len(exact),
            "empty_answers": [float(not answer.strip()) for answer in answers or ["no"] * len(exact)],
            "answer_tokens": [1] * len(exact),
        }
    )


def make_comparison(before: Sequence[int], after: Sequence[int], *, nll_after: float = 1.0) -> Comparison:
    return compare(make_rows(before), make_rows(after, nll=nll_after), EvaluationConfig(num_resamples=500), seed=0)


class PageReader(HTMLParser):
    """Collects tags, the addresses that a browser would load, and the text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "li", "dt", "dd", "link", "img", "input"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> PageReader:
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_the_page_stands_alone_and_holds_what_it_was_given(tmp_path: Path) -> None:
    page = write_report(
        tmp_path / "new" / "folder",
        make_comparison([0] * 40, [1] * 30 + [0] * 10),
        title="A title",
        questions=[("Who are you?", "and the", "A small model.")],
        facts={"Rows": {"read": "2,000", "rejected": "10"}},
        warnings=["Held-out loss rose."],
        curves=[(1, 3.0, None), (2, 2.0, 2.5), (3, 1.0, 1.5)],
    )
    reader = read_page(page)
    for words in ("A title", "30 of 40 held-out questions", "30 improved (75.0 %)", "10 unchanged", "0 worsened"):
        assert words in reader.text
    for words in ("Who are you?", "A small model.", "2,000", "rejected", "Held-out loss rose.", "+75.0 points"):
        assert words in reader.text
    assert reader.open == []
    assert reader.tags.count("svg") == 3
    # Nothing is loaded: only marks within the figures are referred to.
    assert all(address.startswith("#") for address in reader.addresses)
    assert not {"script", "link", "img", "iframe"} & set(reader.tags)
    html = page.read_text(encoding="utf-8")
    assert "@import" not in html
    assert re.findall(r"url\((?!#)", html) == []
    plots = sorted((tmp_path / "new" / "folder" / "plots").iterdir())
    assert [plot.name for plot in plots] == ["metrics.png", "nll.png", "training.png"]
    assert all(plot.read_bytes().startswith(PNG) for plot in plots)


HOSTILE = '</div><script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
TURNED = "the answer is \u202eyes\u202c"


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    rows = make_rows([0, 0], answers=[HOSTILE, ""]).with_columns(question=pl.lit(HOSTILE), reference=pl.lit(HOSTILE))
    comparison = compare(rows, rows, EvaluationConfig(num_resamples=100), seed=0)
    page = write_report(
        tmp_path,
        comparison,
        title=HOSTILE,
        questions=[(HOSTILE, HOSTILE, HOSTILE)],
        facts={HOSTILE: {HOSTILE: HOSTILE}},
        warnings=[HOSTILE],
    )
    reader = read_page(page)
    assert not {"script", "img"} & set(reader.tags)
    assert reader.open == []
    # Title and heading, warning, 2 questions with references and one answer each twice, free question, facts.
    assert reader.text.count(HOSTILE) == 2 + 1 + 2 + 2 + 2 + 3 + 3
    assert "49" not in reader.text.replace("onerror", "")


def test_an_empty_question_is_no_missing_answer(tmp_path: Path) -> None:
    rows = make_rows([0], answers=[""]).with_columns(question=pl.lit(" "))
    text = read_page(write_report(tmp_path, compare(rows, rows, EvaluationConfig(), seed=0), title="t")).text
    assert (text.count("no text"), text.count("no answer")) == (1, 3)  # two answers and a caveat


def test_what_turns_the_direction_of_text_is_written_out(tmp_path: Path) -> None:
    rows = make_rows([0, 0], answers=[TURNED, TURNED]).with_columns(question=pl.lit(TURNED))
    comparison = compare(rows, rows, EvaluationConfig(num_resamples=100), seed=0)
    page = write_report(tmp_path, comparison, title=TURNED, warnings=[TURNED]).read_text(encoding="utf-8")
    assert not re.findall("[\u202a-\u202e]", page)
    # Title and heading, warning, 2 questions and 2 answers each twice.
    assert page.count(r"the answer is \u202eyes\u202c") == 2 + 1 + 2 + 4


def test_the_page_is_the_same_each_time_and_needs_no_extras(tmp_path: Path) -> None:
    comparison = make_comparison([0, 1, 0, 1], [1, 1, 0, 0])
    pages = [write_report(tmp_path / name, comparison, title="t").read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]
    assert not (tmp_path / "a" / "plots" / "training.png").exists()
    assert "Free questions" not in pages[0].decode()


@pytest.mark.parametrize("size", [1, 2, 3000])
def test_any_number_of_rows_makes_a_page_of_bounded_size(tmp_path: Path, size: int) -> None:
    page = write_report(tmp_path, make_comparison([0] * size, [1] * size), title="t")
    assert 20_000 < page.stat().st_size < 400_000
    assert f"{size:,} improved (100.0 %)" in read_page(page).text


def test_long_texts_are_cut_and_say_so() -> None:
    assert clip_text("x" * MAX_TEXT) == "x" * MAX_TEXT
    assert clip_text("x" * 5000) == "x" * MAX_TEXT + " … (5,000 characters)"


def test_a_difference_is_judged_by_its_interval_and_the_metrics_direction() -> None:
    up, down = Delta(value=0.2, ci_low=0.1, ci_high=0.3), Delta(value=-0.2, ci_low=-0.3, ci_high=-0.1)
    unsure = Delta(value=0.2, ci_low=-0.1, ci_high=0.5)
    assert [judge(name, up) for name in ("exact_match", "nll", "answer_tokens")] == ["better", "worse", "changed"]
    assert [judge(name, down) for name in ("chrf", "perplexity", "answer_tokens")] == ["worse", "better", "changed"]
    assert judge("rouge_l", unsure) == "unclear"
    assert judge("rouge_l", Delta(value=0.0, ci_low=0.0, ci_high=0.0)) == "unclear"


def test_the_verdict_in_a_sentence() -> None:
    tone, words = state_verdict(make_comparison([0] * 40, [1] * 30 + [0] * 10, nll_after=0.5))
    assert tone == "better"
    assert words == (
        "The fine-tuned model is better than the base model. "
        "It answers 30 of 40 held-out questions word for word (75.0 %), the base model 0 (0.0 %)."
    )
    tone, words = state_verdict(make_comparison([1] * 30 + [0] * 10, [0] * 40, nll_after=2.0))
    assert (tone, words[:50]) == ("worse", "The fine-tuned model is worse than the base model.")
    tone, words = state_verdict(make_comparison([0] * 40, [1] * 30 + [0] * 10, nll_after=2.0))
    assert tone == "mixed"
    assert "but worse in surprise (nll). Surprise (nll) went from 1.000 to 2.000 over 40" in words
    tone, words = state_verdict(make_comparison([0, 1] * 20, [1, 0] * 20))
    assert (tone, words[:20]) == ("unclear", "No clear difference:")
    assert "The fine-tuned model answers 20 of 40 held-out questions word for word (50.0 %)" in words


def test_caveats_name_few_rows_and_missing_answers() -> None:
    assert list_caveats(make_comparison([0] * 30, [1] * 30)) == []
    assert "only 29 held-out conversations" in list_caveats(make_comparison([0] * 29, [1] * 29))[0]
    assert "one held-out conversation only" in list_caveats(make_comparison([0], [1]))[0]
    rows = make_rows([0] * 40)
    silent = make_rows([0] * 40, answers=["no"] * 37 + ["", " ", "\n"])
    caveats = list_caveats(compare(rows, silent, EvaluationConfig(), seed=0))
    assert caveats == ["The fine-tuned model gave no answer to 3 of 40 questions."]
    looping = rows.with_columns(repetition_rate=pl.lit(0.5))
    caveats = list_caveats(compare(rows, looping, EvaluationConfig(), seed=0))
    assert caveats == ["The fine-tuned model repeats itself more than the base model: 50.0 % against 0.0 %."]


def test_values_are_written_for_people() -> None:
    assert format_value("exact_match", 0.9166) == "91.7 %"
    assert format_value("nll", 0.26149) == "0.261"
    assert format_value("perplexity", 12345.6) == "12,346"
    assert format_change("exact_match", -0.25) == "\N{MINUS SIGN}25.0 points"
    assert format_change("chrf", 3.25) == "+3.2"
    assert format_change("nll", 0.0001) == "0.000"
    assert format_value("reward_margin", -0.0004) == "0.000"
    assert format_value("exact_match", -0.0001) == "0.0 %"


_OVERFLOWS = """() => [...document.querySelectorAll("section, .tile")].flatMap(card => [...card.querySelectorAll("*")]
  .filter(part => !part.closest("svg") && part.getBoundingClientRect().right > card.getBoundingClientRect().right + 1)
  .map(part => part.textContent.slice(0, 60)))"""


@pytest.mark.skipif(not shutil.which("chromium") or not find_spec("playwright"), reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_leaves_its_card_with_a_champion_and_long_names(tmp_path: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright

    base, tuned, champion = make_rows([0] * 40), make_rows([1] * 30 + [0] * 10, nll=0.9), make_rows([1] * 20 + [0] * 20)
    config = EvaluationConfig(num_resamples=200)
    comparison, long = compare(base, tuned, config, seed=0), "a-name-without-any-place-to-break_" * 4
    rival = compare_with_champion("1234", champion, tuned, set(), config, notes=(), seed=0)
    probe = ProbeReport(
        name=long, metric="nll", max_loss=0.5, num_conversations=40, before=1, after=0.9, delta=comparison.delta["nll"]
    )
    decision = judge_gate(comparison.delta, GateConfig(), rival.report, num_conversations=40, probes=(probe,))
    page = write_report(
        tmp_path, comparison, title=long, facts={"Rows": {long: long}}, warnings=[long], rival=rival,
        decision=decision, probes=[probe],
    )  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": width, "height": 900})
        shown.goto(page.as_uri())
        found = shown.evaluate(_OVERFLOWS)
        words = shown.inner_text("body")
        browser.close()
    assert found == []
    assert "no clear change" in words
    assert not re.search(r"(?<![\d.])[-\N{MINUS SIGN}]0(\.0+)?(?![\d.])", words)
