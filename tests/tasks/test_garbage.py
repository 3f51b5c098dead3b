"""What imports bring stays out of the collector's passes; what comes later does not."""

import atexit
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from tasks import garbage


@pytest.fixture(autouse=True)
def _leaves_the_collector_as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what was imported before the tests
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


def test_a_command_ends_without_passes_over_what_it_has_imported() -> None:
    # What was registered first is called last.
    program = (
        "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count())); import flows.cli; flows.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) > 10_000
