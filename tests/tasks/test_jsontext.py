"""JSON text has one meaning, whichever parser takes it."""

import gc
import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import garbage
from tasks.jsontext import NotFast, parse, parse_fast

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.booleans())
def test_a_value_comes_back_as_json_gives_it(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert repr(parse(text)) == repr(json.loads(text))


@pytest.mark.parametrize("text", ["123456789012345678901", "[NaN]", '"\\ud800"', "-Infinity", '"\ud800"'])
def test_what_the_fast_parser_takes_otherwise_or_refuses_is_left_to_json(text: str) -> None:
    assert repr(parse(text)) == repr(json.loads(text))
    if text.isascii():
        with pytest.raises(NotFast):
            parse_fast(text.encode())


def test_an_error_is_that_of_json() -> None:
    with pytest.raises(json.JSONDecodeError, match=r"Expecting value: line 1 column 2"):
        parse("[")


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_collector_is_as_it_was_after_a_pause(was_enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_enabled else gc.disable)()
        with suppress(ZeroDivisionError), garbage.paused():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == was_enabled
    finally:
        (gc.enable if before else gc.disable)()
