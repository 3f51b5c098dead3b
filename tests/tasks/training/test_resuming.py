"""A training that ends too early goes on to the same adapter, after a real SIGKILL in a process of its own as well."""

import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.config import TrainingConfig
from tasks.training.loop import train_adapter
from tasks.training.records import TrainingStopped
from tests.tasks.training.conftest import build_model, write_tokens

# The general engine's dropout draws random numbers at every step, so that a random state that does not come back shows.
CONFIG = TrainingConfig(
    rank=4, alpha=8, dropout=0.1, learning_rate=1e-2, micro_batch=3, gradient_accumulation_steps=2, num_epochs=3,
    checkpoint_every_steps=4, eval_every_steps=5, engine="general",
)  # fmt: skip
NUM_STEPS = 24

CHILD = """
import sys, time
from pathlib import Path
import torch
from schemas.config import TrainingConfig
from tasks.training.loop import train_adapter

torch.set_num_threads(1)
base_model, tokens, run_folder, config, kill_at = sys.argv[1:]

def on_step(record):
    print(record.step, flush=True)
    if record.step > int(kill_at):
        time.sleep(600)  # so that a slow machine cannot finish before the kill

train_adapter(
    Path(base_model), Path(tokens), Path(run_folder), TrainingConfig.model_validate_json(config),
    seed=5, identity="the same", on_step=on_step,
)
"""


@pytest.fixture
def one_thread() -> None:
    """Another number of threads adds in another order, which is not what is tested here."""
    torch.set_num_threads(1)


@pytest.mark.usefixtures("one_thread")
def test_killed_training_goes_on_to_the_same_adapter(tmp_path: Path) -> None:
    base_model = build_model(tmp_path / "model")
    tokens = write_tokens(tmp_path / "tokens", num_train=44)
    undisturbed = train_adapter(base_model, tokens, tmp_path / "whole", CONFIG, seed=5, identity="the same")
    assert undisturbed.num_steps == NUM_STEPS

    # After two checkpoints (the second may still be under way), anywhere within a step, its evaluation and checkpoint.
    kill_at = random.SystemRandom().randint(9, NUM_STEPS - 2)
    arguments = [str(base_model), str(tokens), str(tmp_path / "killed"), CONFIG.model_dump_json(), str(kill_at)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == kill_at:
            child.kill()
            break
    assert child.wait(timeout=60) == -signal.SIGKILL
    child.stdout.close()
    assert not (tmp_path / "killed" / "adapter").exists()

    steps: list[int] = []
    resumed = train_adapter(
        base_model, tokens, tmp_path / "killed", CONFIG, seed=5, identity="the same",
        on_step=lambda record: steps.append(record.step),
    )  # fmt: skip
    assert resumed.resumed_from_step is not None, kill_at
    assert kill_at - 8 <= resumed.resumed_from_step <= kill_at
    assert steps == list(range(resumed.resumed_from_step + 1, NUM_STEPS + 1))
    whole = load_file(undisturbed.adapter / "adapter_model.safetensors")
    again = load_file(resumed.adapter / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert max(float((whole[name] - again[name]).abs().max()) for name in whole) <= 1e-6, kill_at
    assert resumed.final_loss == pytest.approx(undisturbed.final_loss, abs=1e-6)
    assert resumed.num_trained_tokens == undisturbed.num_trained_tokens


@pytest.mark.usefixtures("one_thread")
def test_fused_dropout_goes_on_with_the_same_masks(tmp_path: Path) -> None:
    base_model = build_model(tmp_path / "model")
    tokens = write_tokens(tmp_path / "tokens", num_train=24)
    config = CONFIG.model_copy(update={"engine": "fused"})
    losses: dict[str, list[float]] = {"whole": [], "stopped": []}

    def train(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        outcome = train_adapter(
            base_model, tokens, tmp_path / name, config, seed=5, identity="the same",
            on_step=lambda record: losses[name].append(record.loss),
            should_stop=lambda: len(losses[name]) == stop_at,
        )  # fmt: skip
        return load_file(outcome.adapter / "adapter_model.safetensors")

    whole = train("whole")
    with pytest.raises(TrainingStopped):
        train("stopped", stop_at=5)
    again = train("stopped")
    assert losses["stopped"] == losses["whole"]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
