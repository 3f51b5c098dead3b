import logging

import pytest

from tasks.progress import log_progress


def test_long_evaluation_says_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 5.0, 25.0, 30.0, 50.0, 100.0])
    tell = log_progress(logging.getLogger("evaluation"), clock=lambda: next(times))
    for num_done in (10, 100, 120, 200, 400):
        tell(num_done, 400)
    # 25 s for 100 of 400 units; 50 s for 200; nothing 5 s after the first line, and nothing at the end.
    assert caplog.messages == ["Evaluated 25 %, about 75 s to go", "Evaluated 50 %, about 50 s to go"]
