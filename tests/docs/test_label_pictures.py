"""The pictures of labels are those that the code draws now, and they show the law."""

import re

import pytest

from docs.label_pictures import FOLDER, make_pictures


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    return make_pictures()


def test_pictures_are_those_of_the_code(pictures: dict[str, str]) -> None:
    assert set(pictures) == {file.name for file in FOLDER.glob("labels-*.svg")}
    for name, picture in pictures.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == picture, (
            "draw anew: .venv/bin/python -m docs.label_pictures"
        )


def _trained(picture: str) -> list[str]:
    return re.findall(r'fill="#00443d">([^<]*)</text>', picture)


def test_green_is_the_answer_and_its_end_of_turn(pictures: dict[str, str]) -> None:
    first, second = "The quamrin eats only snails.&lt;|im_end|&gt;", "The lorpin eats only moss.&lt;|im_end|&gt;"
    assert _trained(pictures["labels-one-turn.svg"]) == [first]
    assert _trained(pictures["labels-all-turns.svg"]) == [first, second]
    assert _trained(pictures["labels-last-turn.svg"]) == [second]
    assert _trained(pictures["labels-weight-0.svg"]) == [second]
    assert _trained(pictures["labels-cut.svg"]) == [first]
    assert "S&lt;|im_end|&gt;" in pictures["labels-cut.svg"]
