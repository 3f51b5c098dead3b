"""A training on parts that are read when needed is the one on everything in memory."""

import logging
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.training import order, preparation
from tasks.training.loop import train_adapter
from tasks.training.records import TrainingStopped
from tests.tasks.training.parts.token_parts import CONFIG, GROUPS_PER_WINDOW, NUM_STEPS, note, open_whole, write_parts
from tests.tasks.training.ranks import on_two_ranks


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_losses_are_those_of_everything_in_memory(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    tokens = write_parts(tmp_path / "tokens", is_paired=objective == "dpo")
    config = CONFIG.model_copy(update={"objective": objective})
    told = {}
    for name in ("lazy", "whole"):
        with monkeypatch.context() as patch:
            if name == "whole":
                patch.setattr(preparation, "open_indexed", open_whole)
            losses: list[float] = []
            outcome = train_adapter(
                base_model, tokens, tmp_path / name, config, seed=5, identity="x",
                on_step=partial(note, losses),
            )  # fmt: skip
        told[name] = (losses, load_file(outcome.adapter / "adapter_model.safetensors"), outcome.num_packs)
    assert told["lazy"][0] == pytest.approx(told["whole"][0], abs=1e-6 if objective == "dpo" else 0)
    assert len(told["lazy"][0]) == NUM_STEPS
    assert told["lazy"][2] == told["whole"][2]
    for key, value in told["whole"][1].items():
        torch.testing.assert_close(told["lazy"][1][key], value, rtol=0, atol=1e-5 if objective == "dpo" else 0)
    assert not list((tmp_path / "lazy").glob("examples*"))


def test_a_stopped_training_goes_on_to_the_same_adapter(
    base_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, losses = write_parts(tmp_path / "tokens"), list[float]()

    def train(name: str, stop_at: int) -> Any:
        return train_adapter(
            base_model, tokens, tmp_path / name, CONFIG, seed=5, identity="x",
            on_step=lambda record: losses.append(record.loss), should_stop=lambda: len(losses) == stop_at,
        )  # fmt: skip

    whole = load_file(train("whole", 1000).adapter / "adapter_model.safetensors")
    expected, losses[:] = losses.copy(), []
    with suppress(TrainingStopped):
        train("stopped", 11)
    assert not list((tmp_path / "stopped").glob("examples*"))
    with caplog.at_level(logging.INFO):
        rest = load_file(train("stopped", 1000).adapter / "adapter_model.safetensors")
    assert losses == expected
    assert all(torch.equal(rest[name], value) for name, value in whole.items())
    assert re.search(r"Of the 12 parts of the tokens \d+ were used, .* 0 were fetched \(0\.0 MB\)", caplog.text)


def train_divided(number: int, base_model: Path, tokens: Path, folder: Path) -> list[float]:
    """Train with passes that are collectives; return the losses."""
    order.GROUPS_PER_WINDOW = GROUPS_PER_WINDOW
    config, losses = CONFIG.model_copy(update={"strategy": "fsdp", "max_steps": 10}), list[float]()
    train_adapter(
        base_model, tokens, folder, config, seed=5, identity="x",
        on_step=lambda record: losses.append(record.loss),
    )  # fmt: skip
    return losses


def test_ranks_that_gather_weights_do_as_many_passes(base_model: Path, tmp_path: Path) -> None:
    tokens, losses = write_parts(tmp_path / "tokens"), list[float]()
    config = CONFIG.model_copy(update={"max_steps": 10})
    train_adapter(base_model, tokens, tmp_path / "alone", config, seed=5, identity="x", on_step=partial(note, losses))
    for found in on_two_ranks(train_divided, base_model, tokens, tmp_path / "two", folder=tmp_path / "ranks"):
        assert found == pytest.approx(losses, abs=1e-5)
    assert not list((tmp_path / "two").glob("examples*"))
