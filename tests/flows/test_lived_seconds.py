"""How long a run took does not depend on what somebody does to the clock meanwhile."""

import time

import psutil
import pytest

from flows.terminal import lived_seconds


@pytest.mark.parametrize("jump", [86_400.0, -3_600.0])
def test_a_clock_that_is_set_does_not_count(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    lived = time.time() - psutil.Process().create_time()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    assert lived_seconds() == pytest.approx(lived, abs=5.0)
