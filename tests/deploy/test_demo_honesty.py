"""The base model saw no question and no answer, and no training row asks about what is held out."""

import re

from deploy.demo.world import make_facts, make_things

Rows = list[dict[str, str]]


def test_corpus_has_no_question_mark(documents: list[str]) -> None:
    assert not [text for text in documents if "?" in text or "？" in text]


def test_corpus_has_no_question_word_that_opens_a_sentence(documents: list[str]) -> None:
    asked = re.compile(r"(?:^|[.\n] ?)(?:What|Which|Who|Whose|Where|Why|How)\b|什么|哪|吗|怎|多少|谁")
    assert not [text for text in documents if asked.search(text)]


def test_corpus_has_no_chat_marker(documents: list[str]) -> None:
    marker = re.compile(r"<\||\|>|\b(?:user|assistant|system|question|answer)\b|问题|回答", re.IGNORECASE)
    assert not [text for text in documents if marker.search(text)]


def test_corpus_holds_no_row_of_the_dataset(documents: list[str], train_rows: Rows, held_out_rows: Rows) -> None:
    text = "\n".join(documents).lower()
    instructions = {row["instruction"].lower() for row in train_rows + held_out_rows}
    assert not [instruction for instruction in instructions if instruction in text]
    answers = {row["output"].lower().rstrip(".。") for row in held_out_rows}
    assert not [answer for answer in answers if answer in text]


def test_no_training_row_names_what_is_held_out(train_rows: Rows, held_out_rows: Rows) -> None:
    leaked = [row for row in train_rows if row in held_out_rows]
    assert len(leaked) == 2  # planted, for the pipeline to find
    subjects = {fact.subject.lower() for fact in make_facts() if fact.held_out}
    assert len(subjects) == 32 + 15 + 8 + 8 + 24  # English things, Chinese things, sums, words, lists
    texts = ["\n".join(row.values()).lower() for row in train_rows if row not in held_out_rows]
    assert not [(subject, text) for subject in subjects for text in texts if _names(text, subject)]


def test_every_held_out_row_is_about_what_is_held_out(held_out_rows: Rows) -> None:
    answers = {fact.answer for fact in make_facts() if fact.held_out}
    assert {row["output"] for row in held_out_rows} == answers


def test_each_held_out_fact_stands_in_prose(documents: list[str]) -> None:
    text = [document.lower() for document in documents]
    for thing in [thing for thing in make_things() if thing.held_out]:
        about = [document for document in text if thing.name.lower() in document]
        for value in thing.values.values():
            assert sum(value.lower() in document for document in about) >= 50, (thing.name, value)


def test_another_seed_gives_another_world() -> None:
    ours, other = make_things(7), make_things(8)
    assert [thing.name for thing in ours] != [thing.name for thing in other]


def _names(text: str, subject: str) -> bool:
    """Tell whether the subject stands in the text as whole words; Chinese has no word borders."""
    if not subject.isascii():
        return subject in text
    return re.search(rf"(?<![a-z]){re.escape(subject)}(?![a-z])", text) is not None
