"""What imports bring stays out of the collector's passes; what comes later does not."""

import atexit
import gc
import weakref
from collections.abc import Iterator

import pytest

from tasks import garbage


@pytest.fixture(autouse=True)
def _leaves_the_collector_as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()
    atexit.unregister(gc.freeze)


class Knot:
    """Only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


def test_imports_run_without_passes_and_stay_out_of_later_ones() -> None:
    before = gc.get_freeze_count()
    with garbage.importing():
        assert not gc.isenabled()
        brought = [[number] for number in range(1000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(brought)


def test_what_comes_after_the_imports_is_still_collected() -> None:
    with garbage.importing():
        pass
    knot = Knot()
    freed = weakref.ref(knot)
    del knot
    gc.collect()
    assert freed() is None


def test_an_import_that_fails_turns_the_collector_on_again() -> None:
    with pytest.raises(ImportError), garbage.importing():
        raise ImportError("no such module")
    assert gc.isenabled()
