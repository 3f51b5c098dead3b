import copy
import math
import pickle
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.training.checkpoints import CheckpointError
from tasks.training.loop import EvalRecord, StepRecord, TrainingError, TrainingOutcome, train_adapter
from tasks.training.optimization import descend
from tasks.training.preparation import prepare_training
from tasks.training.validation import count_evals_since_best, find_overfitting
from tests.tasks.training.conftest import build_model, draw_examples, write_split

SMALL = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "micro_batch": 4, "num_epochs": 2}


def train(
    base_model: Path, tokens: Path, run_folder: Path, **settings: Any
) -> tuple[TrainingOutcome, list[StepRecord], list[EvalRecord]]:
    steps: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    outcome = train_adapter(
        base_model,
        tokens,
        run_folder,
        TrainingConfig.model_validate({**SMALL, **settings}),
        seed=0,
        identity="this run",
        on_step=steps.append,
        on_eval=evaluations.append,
    )
    return outcome, steps, evaluations


def read_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_records_and_outcome(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    outcome, steps, evaluations = train(base_model, tokens, tmp_path, gradient_accumulation_steps=2)
    # 40 examples in steps of 8 are 5 steps an epoch.
    assert [record.step for record in steps] == list(range(1, 11))
    assert {record.num_steps for record in steps} == {10}
    assert [record.epoch for record in steps[:5]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert [record.step for record in evaluations] == list(range(1, 11))
    assert sum(record.num_tokens for record in steps[:5]) == sum(record.num_tokens for record in steps[5:])
    assert outcome.num_trained_tokens == sum(record.num_trained_tokens for record in steps)
    assert all(record.grad_norm > 0 and record.tokens_per_second > 0 for record in steps)
    assert outcome.final_loss == steps[-1].loss
    assert outcome.best_eval_loss == min(record.loss for record in evaluations)
    assert (outcome.num_steps, outcome.adapter_step, outcome.resumed_from_step) == (10, 10, None)
    assert (outcome.num_examples, outcome.num_packs, outcome.packing_efficiency) == (40, 40, 1.0)
    # rank 4 beside q, k, v, o of 32 -> 32, 16, 16 and 32 -> 32, gate and up 32 -> 48, down 48 -> 32; two layers.
    assert outcome.num_trainable_parameters == 2 * 4 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert outcome.peak_memory_bytes > 10_000_000


def test_adapter_loads_with_peft_and_is_what_was_trained(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    outcome, _, _ = train(base_model, tokens, tmp_path)
    base: Any = load_model(base_model)
    ids = torch.tensor([[5, 9, 13, 2]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, str(outcome.adapter))(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 0.01
    assert {tensor.dtype for tensor in read_adapter(outcome.adapter).values()} == {torch.float32}


def test_learns_by_heart(tmp_path: Path) -> None:
    # With larger weights the head can be certain: |hidden| |embedding| bounds a logit.
    base_model = build_model(tmp_path / "model", initializer_range=0.5)
    examples = draw_examples(4, seed=3)
    write_split(tmp_path / "train.parquet", examples)
    write_split(tmp_path / "eval.parquet", examples, prefix="eval")
    outcome, steps, evaluations = train(
        base_model, tmp_path, tmp_path / "run", rank=16, num_epochs=60, learning_rate=2e-2
    )
    assert steps[0].loss > 4
    assert outcome.final_loss < 0.05
    assert evaluations[-1].loss < 0.05


def test_packing_is_counted(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    outcome, steps, _ = train(base_model, tokens, tmp_path, packing=True, tokens_per_pack=64, micro_batch=2)
    total = sum(record.num_tokens for record in steps) // 2
    assert outcome.num_packs < 40
    assert outcome.packing_efficiency == pytest.approx(total / (outcome.num_packs * 64))
    assert outcome.packing_efficiency > 0.9


def test_early_stopping_keeps_the_best_adapter(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    # What is trained and what is held out are both random: the held-out loss soon rises.
    settings: dict[str, Any] = {"num_epochs": 30, "eval_every_steps": 5, "learning_rate": 2e-2}
    stopped, steps, evaluations = train(base_model, tokens, tmp_path / "a", early_stopping_patience=2, **settings)
    losses = [record.loss for record in evaluations]
    assert stopped.num_steps < 300
    assert len(steps) == stopped.num_steps == evaluations[-1].step
    assert losses.index(min(losses)) == len(losses) - 3
    assert stopped.adapter_step == evaluations[-3].step
    kept = tmp_path / "a" / "checkpoints" / f"step-{stopped.adapter_step:06d}" / "trained.safetensors"
    best = load_file(kept)
    for name, tensor in read_adapter(stopped.adapter).items():
        assert torch.equal(tensor, best[name.replace(".weight", ".default.weight")])


def test_overfitting_is_a_warning(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    outcome, _, _ = train(base_model, tokens, tmp_path, num_epochs=20, learning_rate=2e-2)
    assert len(outcome.warnings) == 1
    assert outcome.warnings[0].startswith("over-fitting: from step")


def make_curve(*losses: tuple[float, float]) -> list[EvalRecord]:
    """Records from pairs of held-out and training loss."""
    return [
        EvalRecord(
            step=10 * (i + 1), num_steps=100, epoch=0.1, loss=loss, train_loss=train_loss,
            is_best=all(loss < earlier for earlier, _ in losses[:i]),
        )
        for i, (loss, train_loss) in enumerate(losses)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(2.0, 2.0), (1.5, 1.5), (1.6, 1.0), (1.7, 0.5)], True),
        ([(2.0, 2.0), (1.5, 1.5), (1.6, 1.0), (1.4, 0.5)], False),  # one rise
        ([(1.5, 1.0), (1.6, 1.1), (1.7, 1.2)], False),  # both rise: diverging
        ([(1.5, 1.0), (1.5001, 0.9), (1.5002, 0.8)], False),  # less than a hundredth
        ([(1.5, 1.0), (1.6, 0.9)], False),
        ([], False),
    ],
)
def test_overfitting_by_hand(curve: list[tuple[float, float]], expected: bool) -> None:
    warning = find_overfitting(make_curve(*curve))
    assert (warning is not None) is expected
    if expected:
        assert warning is not None
        assert "from step 20 to 40 the held-out loss rose from 1.5000 to 1.7000" in warning


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        # The held-out loss stands still, the training loss goes on to fall.
        ([(1.50, 1.4), (1.499, 1.2), (1.499, 1.0), (1.498, 0.9), (1.497, 0.7)], True),
        ([(1.50, 1.4), (1.499, 1.2), (1.499, 1.0), (1.498, 0.9)], False),  # not for long enough
        ([(1.50, 1.4), (1.45, 1.2), (1.40, 1.0), (1.35, 0.9), (1.30, 0.7)], False),  # both learn
        ([(1.50, 1.4), (1.499, 1.2), (1.499, 1.25), (1.498, 0.9), (1.497, 0.7)], False),  # the gap narrowed once
        ([(1.50, 1.4), (1.499, 1.39), (1.499, 1.38), (1.498, 1.37), (1.497, 1.36)], False),  # a small gap
    ],
)
def test_gap_that_keeps_widening_is_overfitting(losses: list[tuple[float, float]], expected: bool) -> None:
    warning = find_overfitting(make_curve(*losses))
    assert (warning is not None) is expected
    if warning is not None:
        assert "from step 10 to 50 the training loss fell from 1.4000 to 0.7000" in warning


def test_best_or_last_adapter_is_kept_as_the_config_says(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    settings = {"num_epochs": 6, "learning_rate": 5e-2, "eval_every_steps": 5, "keep_checkpoints": 1}
    best, _, evaluations = train(base_model, tokens, tmp_path / "best", keep="best", **settings)
    lowest = min(evaluations, key=lambda record: record.loss)
    assert best.adapter_step == lowest.step < best.num_steps
    last, _, _ = train(base_model, tokens, tmp_path / "last", keep="last", **settings)
    assert last.adapter_step == last.num_steps == best.num_steps
    one, other = read_adapter(best.adapter), read_adapter(last.adapter)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    kept = load_file(tmp_path / "best" / "checkpoints" / f"step-{lowest.step:06d}" / "trained.safetensors")
    assert all(torch.equal(tensor, kept[name.replace(".weight", ".default.weight")]) for name, tensor in one.items())


def test_patience_counts_from_the_best() -> None:
    assert count_evals_since_best([]) == 0
    assert count_evals_since_best(make_curve((2.0, 1.0))) == 0
    assert count_evals_since_best(make_curve((2.0, 1.0), (1.0, 1.0), (1.5, 1.0), (1.2, 1.0))) == 2


def build_poisoned(folder: Path, token: int) -> Path:
    """Save a model with NaN as the embedding of one token; its head is untied, and so stays finite."""
    model: Any = load_model(build_model(folder, tie_word_embeddings=False))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    model.save_pretrained(folder)
    return folder


def test_loss_that_is_not_finite_names_step_and_example(tmp_path: Path) -> None:
    examples = [([3, 4, 5, 6 + number], 2) for number in range(8)]
    examples[5] = ([3, 4, 50, 6], 2)
    write_split(tmp_path / "train.parquet", examples)
    write_split(tmp_path / "eval.parquet", [])
    model = build_poisoned(tmp_path / "model", 50)
    with pytest.raises(TrainingError, match=r"step \d+: the loss is not finite") as caught:
        train(model, tmp_path, tmp_path / "run", micro_batch=1, gradient_accumulation_steps=2)
    message = str(caught.value)
    assert "train-0005:" in message
    assert message.count("train-") == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("engine", ["general", "fused"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, engine: Literal["general", "fused"]) -> None:
    write_split(tmp_path / "train.parquet", [([3, 4, 5, 6], 2), ([3, 4, 5, 6], 2), ([3, 4, 50, 6], 2)])
    model = build_poisoned(tmp_path / "model", 50)
    config = TrainingConfig(micro_batch=1, rank=4, engine=engine, weight_decay=0.5)
    setup = prepare_training(model, tmp_path, tmp_path / "examples", config, seed=0)
    fine, poisoned = (setup.engine.form_step(setup.table, [[index]]) for index in (0, 2))
    descend(setup, fine, 1e-2, step=1)
    before = copy.deepcopy((list(setup.parameters.values()), setup.optimizer.unsharded()[1].state_dict()["state"]))
    with pytest.raises(TrainingError, match="step 2: the loss is not finite"):
        descend(setup, poisoned, 1e-2, step=2)
    after = (list(setup.parameters.values()), setup.optimizer.unsharded()[1].state_dict()["state"])
    assert_close(after, before, rtol=0, atol=0)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in setup.parameters.values())
    descend(setup, fine, 1e-2, step=2)
    assert not torch.equal(next(iter(setup.parameters.values())), before[0][0])


def test_held_out_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", [([3, 4, 5], 1)] * 4)
    write_split(tmp_path / "eval.parquet", [([3, 50, 5], 1)])
    with pytest.raises(TrainingError, match="step 1: the held-out loss is nan"):
        train(build_poisoned(tmp_path / "model", 50), tmp_path, tmp_path / "run")


def test_what_cannot_be_trained_on_is_refused(base_model: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", [])
    write_split(tmp_path / "eval.parquet", [])
    with pytest.raises(TrainingError, match="no training examples"):
        train(base_model, tmp_path, tmp_path / "run")
    write_split(tmp_path / "train.parquet", [([3, 4, 5], 3)])
    with pytest.raises(TrainingError, match="example train-0000: no trained token"):
        train(base_model, tmp_path, tmp_path / "run")
    write_split(tmp_path / "train.parquet", [([3, 4, 5], 1), ([3, 97, 5], 1)])
    with pytest.raises(TrainingError, match=r"example train-0001 has token id 97, but .* 97 rows"):
        train(base_model, tmp_path, tmp_path / "run")
    write_split(tmp_path / "train.parquet", [([3, 4, 5, 6, 7, 8, 9, 10, 11], 1)])
    with pytest.raises(TrainingError, match="tokens_per_pack is 8, but example train-0000 has 9 tokens"):
        train(base_model, tmp_path, tmp_path / "run", packing=True, tokens_per_pack=8)
    with pytest.raises(TrainingError, match=r"early_stopping_patience is 1, but .* has no held-out examples"):
        train(base_model, tmp_path, tmp_path / "run", early_stopping_patience=1)


def test_no_held_out_examples_train_without_evaluation(base_model: Path, tmp_path: Path) -> None:
    write_split(tmp_path / "train.parquet", draw_examples(8))
    outcome, steps, evaluations = train(base_model, tmp_path, tmp_path / "run")
    assert (outcome.best_eval_loss, evaluations, len(steps)) == (None, [], 4)


def test_tensorboard(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    _, steps, evaluations = train(base_model, tokens, tmp_path, report_to=("tensorboard",), eval_every_steps=5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([s.loss for s in steps], rel=1e-6)
    assert [e.value for e in events.Scalars("eval/loss")] == pytest.approx([e.loss for e in evaluations], rel=1e-6)
    train(base_model, tokens, tmp_path / "without")
    assert not (tmp_path / "without" / "tensorboard").exists()


def test_gradient_checkpointing_changes_nothing(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    _, plain, _ = train(base_model, tokens, tmp_path / "a", max_steps=4)
    _, saving, _ = train(base_model, tokens, tmp_path / "b", max_steps=4, gradient_checkpointing=True)
    assert [record.loss for record in saving] == pytest.approx([record.loss for record in plain], abs=1e-6)


def test_bf16_follows_fp32(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "modules_to_save": ("embed_tokens",)}
    _, full, _ = train(base_model, tokens, tmp_path / "a", precision="fp32", **settings)
    outcome, half, _ = train(base_model, tokens, tmp_path / "b", precision="bf16", **settings)
    # bf16 has 8 bits: a few hundredths of a loss near 5.
    assert [record.loss for record in half] == pytest.approx([record.loss for record in full], abs=0.1)
    assert [record.loss for record in half] != [record.loss for record in full]
    assert {tensor.dtype for tensor in read_adapter(outcome.adapter).values()} == {torch.float32}


def test_finished_run_is_not_trained_again(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    first, _, _ = train(base_model, tokens, tmp_path)
    adapter = read_adapter(first.adapter)
    again, steps, evaluations = train(base_model, tokens, tmp_path)
    assert (steps, evaluations, again.resumed_from_step) == ([], [], 20)
    assert again.final_loss == first.final_loss
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in read_adapter(again.adapter).items())


def test_changed_run_is_refused(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    train(base_model, tokens, tmp_path)
    with pytest.raises(CheckpointError, match=r"identity this run, but .* now give a changed one"):
        train_adapter(base_model, tokens, tmp_path, TrainingConfig(), seed=0, identity="a changed one")


def test_damaged_checkpoint_is_told_and_gone_around(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    whole, _, _ = train(base_model, tokens, tmp_path, checkpoint_every_steps=8, eval_every_steps=20)
    adapter = read_adapter(whole.adapter)
    for path in (tmp_path / "checkpoints" / "step-000020").glob("optimizer.*"):
        path.write_bytes(b"")
    again, steps, _ = train(base_model, tokens, tmp_path, checkpoint_every_steps=8, eval_every_steps=20)
    assert again.resumed_from_step == 16
    assert [record.step for record in steps] == [17, 18, 19, 20]
    assert "step-000020 is damaged" in again.warnings[0]
    later, _, _ = train(base_model, tokens, tmp_path, checkpoint_every_steps=8, eval_every_steps=20)
    assert (later.resumed_from_step, later.warnings) == (20, again.warnings)
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in read_adapter(again.adapter).items())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"dropout": 0.2},
        {"target_modules": ("q_proj", "down_proj")},
        {"target_modules": ("lm_head",)},
        {"modules_to_save": ("embed_tokens",)},
    ],
)
def test_settings_of_lora_train(base_model: Path, tokens: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    _, steps, _ = train(base_model, tokens, tmp_path, **settings)
    assert sum(record.loss for record in steps[10:]) < sum(record.loss for record in steps[:10])
