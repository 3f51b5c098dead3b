"""What two trainings of one process log reaches the listener of each alone."""

import logging
import threading

from tasks.training.process.in_place import _telling


def test_each_thread_tells_its_own_listener_and_the_loggers_are_left_as_they_were() -> None:
    training = logging.getLogger("tasks.training")
    before = training.level, training.propagate, list(training.handlers)
    begun, ended = threading.Barrier(3), threading.Barrier(3)
    heard: dict[str, list[str]] = {"one": [], "two": []}

    def train(name: str) -> None:
        begun.wait()
        training.info("a line of %s", name)
        ended.wait()

    def listen(name: str) -> None:
        thread = threading.Thread(target=train, args=(name,))
        with _telling(thread, lambda level, line: heard[name].append(line)):
            thread.start()
            thread.join()

    listeners = [threading.Thread(target=listen, args=(name,)) for name in heard]
    for listener in listeners:
        listener.start()
    begun.wait()
    training.info("a line of a thread that does not train")
    ended.wait()
    for listener in listeners:
        listener.join()
    assert heard == {"one": ["a line of one"], "two": ["a line of two"]}
    assert (training.level, training.propagate, training.handlers) == before
