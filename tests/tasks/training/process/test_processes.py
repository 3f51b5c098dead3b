"""As many processes as the machine has GPUs, where the config leaves it to the machine, and idle ones are told."""

import pytest
from pydantic import ValidationError

from schemas.config import TrainingConfig
from tasks.training.process import launch
from tasks.training.process.launch import describe_idle, settle_processes


@pytest.mark.parametrize(
    ("num_gpus", "rows", "num_nodes", "expected"), [(8, 16, 1, 8), (8, 4, 1, 4), (8, 16, 4, 4), (0, 16, 1, 1)]
)
def test_auto_takes_all_gpus_that_a_step_has_rows_for(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, rows: int, num_nodes: int, expected: int
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    config = TrainingConfig(num_processes="auto", micro_batch=rows, num_nodes=num_nodes)
    assert config.num_ranks == num_nodes  # before the machine was asked
    settled = settle_processes(config)
    assert settled.num_processes == expected
    assert TrainingConfig.model_validate(settled.model_dump()) == settled
    assert settle_processes(TrainingConfig(num_processes=3)).num_processes == 3


def test_idle_gpus_are_told_where_they_could_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 4)
    told = describe_idle(TrainingConfig(num_processes=3))
    assert told == "1 GPU of this machine is not used by this training: training.num_processes auto takes all of them"
    assert describe_idle(TrainingConfig(num_processes=4)) is None
    assert describe_idle(TrainingConfig(num_processes=2, micro_batch=2)) is None  # a step has no more rows
    shared = describe_idle(TrainingConfig(num_processes=2, context_parallel=2, micro_batch=2))
    assert shared == "2 GPUs of this machine are not used by this training: training.num_processes may be 4"
    assert describe_idle(TrainingConfig(num_processes=3, context_parallel=3)) is None  # one is no group


def test_another_word_than_auto_is_refused() -> None:
    for wrong in ("all", 0, 1025):
        with pytest.raises(ValidationError):
            TrainingConfig(num_processes=wrong)


def test_what_several_processes_cannot_do_is_refused_with_auto_too() -> None:
    with pytest.raises(ValidationError, match="packed weights"):
        TrainingConfig(num_processes="auto", strategy="fsdp", base_weights="nf4")
