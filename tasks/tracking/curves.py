"""Metrics of a run: one call a step, or many steps in one call."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from mlflow.entities import Metric

from tasks.tracking.connection import client
from tasks.tracking.stopwatch import tracking_time

_METRICS_A_CALL = 1000  # MLflow takes no more in one
_SEND_SECONDS = 2.0


@tracking_time()
def log_metrics(run_id: str, metrics: Mapping[str, float], step: int = 0, *, model_id: str | None = None) -> None:
    """Log metrics of one step, also on a logged model; MLflow keeps NaN and infinity as they are."""
    now = int(time.time() * 1000)
    listed = [Metric(name, float(value), now, step, model_id=model_id) for name, value in metrics.items()]
    client().log_batch(run_id, metrics=listed)


@contextmanager
def metric_log(run_id: str) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Give a function that takes (step, metrics) and sends them every two seconds and at the end.

    A curve of thousands of steps then costs a call every two seconds and not one a step.
    """
    waiting: list[Metric] = []
    sent = time.monotonic()

    @tracking_time()
    def send() -> None:
        for start in range(0, len(waiting), _METRICS_A_CALL):
            client().log_batch(run_id, metrics=waiting[start : start + _METRICS_A_CALL])
        waiting.clear()

    def log(step: int, metrics: Mapping[str, float]) -> None:
        nonlocal sent
        now = int(time.time() * 1000)
        waiting.extend(Metric(name, float(value), now, step) for name, value in metrics.items())
        if time.monotonic() - sent > _SEND_SECONDS:
            send()
            sent = time.monotonic()

    try:
        yield log
    finally:
        send()


def training_curves(run_id: str) -> list[tuple[int, float, float | None]]:
    """Return (step, train loss, evaluation loss where there was one) of a training run."""
    evals = {metric.step: metric.value for metric in client().get_metric_history(run_id, "eval/loss")}
    train = client().get_metric_history(run_id, "train/loss")
    return [(metric.step, metric.value, evals.get(metric.step)) for metric in sorted(train, key=lambda m: m.step)]
