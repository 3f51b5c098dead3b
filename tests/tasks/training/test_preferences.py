"""Direct preference optimization in all engines against plain PyTorch on one answer at a time, and whole trainings."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
import torch
from torch import Tensor

from schemas.config import DpoConfig, TrainingConfig
from tasks.preferences import compute_pair_losses
from tasks.training.batches import form_batch
from tasks.training.checkpoints import CheckpointError
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.general import GeneralEngine
from tasks.training.engines.loss import compute_token_losses
from tasks.training.loop import train_adapter
from tasks.training.optimization import descend
from tasks.training.optimizers import WholeOptimizer
from tasks.training.place import open_place
from tasks.training.preferences import FIGURES, find_reference
from tasks.training.preparation import Setup, prepare_training
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingStopped
from tests.tasks.training.conftest import draw_examples
from tests.tasks.training.families import build_family

ENGINES = ("fused", "general", "padded")


def write_pairs(folder: Path, *, num_train: int = 12, num_eval: int = 5) -> Path:
    """Write a tokens folder of pairs: a prompt of two to six ids, and two answers of uneven lengths."""
    folder.mkdir(parents=True)
    lists = pa.list_(pa.int32())
    for split, count, seed in (("train", num_train, 1), ("eval", num_eval, 2)):
        generator = np.random.default_rng(seed)
        table: dict[str, Any] = {"example_id": [f"{split}-{number}" for number in range(count)]}
        prompts = [generator.integers(2, 97, generator.integers(2, 7)).tolist() for _ in range(count)]
        for name, kind in (("input_ids", "labels"), ("rejected_ids", "rejected_labels")):
            answers = [ids[:9] for ids, _ in draw_examples(count, seed=int(generator.integers(99)))]
            pairs = list(zip(prompts, answers, strict=True))
            table[name] = pa.array([prompt + answer for prompt, answer in pairs], lists)
            table[kind] = pa.array([[-100] * len(prompt) + answer for prompt, answer in pairs], lists)
        pq.write_table(pa.table(table), folder / f"{split}.parquet")
    return folder


def prepare(tmp_path: Path, engine: str, dpo: DpoConfig | None = None, **training: Any) -> Setup:
    base_model = build_family(tmp_path / "model", "gemma2" if engine == "padded" else "llama")
    tokens = write_pairs(tmp_path / "tokens")
    choice: Any = "general" if engine == "padded" else engine
    config = TrainingConfig(
        objective="dpo",
        dpo=dpo or DpoConfig(),
        rank=4,
        alpha=8,
        micro_batch=4,
        max_grad_norm=1e9,
        engine=choice,
        **training,
    )
    setup = prepare_training(base_model, tokens, tmp_path / "examples", config, seed=3)
    assert setup.eval_table is not None
    tables = {"train": setup.table, "eval": setup.eval_table}
    found = find_reference(tmp_path, "id", tables, setup.model, setup.engine, config, has_begun=False)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in setup.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return replace(setup, table=found["train"], eval_table=found["eval"])


@pytest.mark.parametrize("engine", ["fused", "general"])
def test_a_pass_takes_both_answers_of_the_longest_pair(tmp_path: Path, engine: str) -> None:
    setup = prepare(tmp_path, engine, tokens_per_pack=8)
    longest = int(setup.table.group_lengths.max())
    assert longest > int(setup.table.lengths.max()) > 8
    assert isinstance(setup.engine, FusedEngine | GeneralEngine)
    assert setup.engine.tokens_per_forward == longest


def add_log_probs(setup: Setup, index: int) -> Tensor:
    """Return the log-probability of an example's answer by the model's own forward pass."""
    return -compute_token_losses(setup.model, form_batch(replace(setup.table, group=1), [[index]])).sum()


def compute_plainly(setup: Setup, dpo: DpoConfig, pairs: int) -> tuple[float, Tensor, dict[str, float]]:
    """Return loss, gradient and figures, an example at a time, with the adapter off for the reference."""
    base: Any = setup.model.get_base_model()
    chosen = base.config._attn_implementation
    base.set_attn_implementation("eager")
    losses, rewards = [], []
    for pair in range(pairs):
        examples = (2 * pair, 2 * pair + 1)
        with torch.no_grad(), setup.model.disable_adapter():
            before = [add_log_probs(setup, index) for index in examples]
        ratios = [add_log_probs(setup, index) - old for index, old in zip(examples, before, strict=True)]
        if dpo.loss == "ipo":
            lengths = [int((setup.table.targets[slice(*setup.table.offsets[i : i + 2])] >= 0).sum()) for i in examples]
            ratios = [ratio / length for ratio, length in zip(ratios, lengths, strict=True)]
        margin = ratios[0] - ratios[1]
        if dpo.loss == "sigmoid":
            right, wrong = 1 / (1 + (-dpo.beta * margin).exp()), 1 / (1 + (dpo.beta * margin).exp())
            losses.append(-(1 - dpo.label_smoothing) * right.log() - dpo.label_smoothing * wrong.log())
        else:
            losses.append((margin - 0.5 / dpo.beta) ** 2 if dpo.loss == "ipo" else (1 - dpo.beta * margin).clamp(min=0))
        rewards.append([float(dpo.beta * ratio.detach()) for ratio in ratios])
    base.set_attn_implementation(chosen)
    loss = torch.stack(losses).mean()
    grads = torch.autograd.grad(loss, list(setup.parameters.values()))
    table = np.array(rewards)
    margins = table[:, 0] - table[:, 1]
    told = ((margins > 0).mean(), margins.mean(), *table.mean(axis=0))
    return float(loss), torch.cat([g.flatten() for g in grads]), dict(zip(FIGURES, map(float, told), strict=True))


def take_gradient(setup: Setup, pairs: int) -> tuple[float, Tensor, dict[str, float]]:
    """Do a step with plain gradient descent at rate 1, and take it back."""
    before = {name: parameter.detach().clone() for name, parameter in setup.parameters.items()}
    assert isinstance(setup.optimizer, WholeOptimizer)
    optimizer = replace(setup.optimizer, optimizer=torch.optim.SGD(list(setup.parameters.values()), fused=True))
    batches = setup.engine.form_step(setup.table, setup.rows[:pairs])
    loss, _, figures, _ = descend(replace(setup, optimizer=optimizer), batches, 1.0, step=1)
    gradient = torch.cat([(before[name] - p).flatten() for name, p in setup.parameters.items()]).detach()
    with torch.no_grad():
        for name, parameter in setup.parameters.items():
            parameter.copy_(before[name])
    return loss, gradient, figures


@pytest.mark.parametrize(
    "dpo",
    [DpoConfig(), DpoConfig(beta=0.4, label_smoothing=0.2), DpoConfig(beta=0.3, loss="hinge"), DpoConfig(loss="ipo")],
    ids=["sigmoid", "smoothed", "hinge", "ipo"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_pairs_are_learned_as_the_formula_says(tmp_path: Path, engine: str, dpo: DpoConfig) -> None:
    setup = prepare(tmp_path, engine, dpo)
    wanted = compute_plainly(setup, dpo, 8)
    found = take_gradient(setup, 8)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    # Sums over answers of about a hundred nats, in fp32: their differences are rounded to some 1e-6.
    assert found[2] == pytest.approx(wanted[2], rel=1e-4, abs=1e-5)
    assert wanted[2]["reward_margin"] != 0
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_forward_passes_of_any_size_keep_pairs_together(tmp_path: Path, engine: str) -> None:
    setup = prepare(tmp_path, engine)
    wanted = take_gradient(setup, 8)
    whole: Any = setup.engine
    small = replace(setup, engine=replace(whole, tokens_per_forward=16, room_tokens=16))
    batches = small.engine.form_step(setup.table, setup.rows[:8])
    assert len(batches) > len(whole.form_step(setup.table, setup.rows[:8]))
    for batch in batches:
        assert [name.removesuffix(" (rejected)") for name in batch.example_ids[1::2]] == list(batch.example_ids[::2])
    found = take_gradient(small, 8)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-4


def test_packs_hold_whole_pairs(tmp_path: Path) -> None:
    setup = prepare(tmp_path, "fused", packing=True, tokens_per_pack=64)
    rows = [list(row) for row in setup.rows]
    assert sorted(index for row in rows for index in row) == list(range(24))
    pairs = [pair for row in rows for pair in zip(row[::2], row[1::2], strict=True)]
    assert all(first % 2 == 0 and second == first + 1 for first, second in pairs)
    assert max(len(row) for row in rows) > 2
    assert max(int(setup.table.lengths[row].sum()) for row in rows) <= 64
    with pytest.raises(TrainingError, match=r"the two answers of example train-\d+ have \d+ tokens"):
        prepare(tmp_path / "narrow", "fused", packing=True, tokens_per_pack=8)


def test_losses_by_hand() -> None:
    margins = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    found = compute_pair_losses(margins, DpoConfig(beta=0.5))
    assert found.tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(0.5))])
    assert compute_pair_losses(margins, DpoConfig(beta=0.5, loss="hinge")).tolist() == [1.0, 0.0, 1.5]
    assert compute_pair_losses(margins, DpoConfig(beta=0.5, loss="ipo")).tolist() == [1.0, 1.0, 4.0]


@pytest.mark.parametrize("engine", ["fused", "general"])
def test_whole_training_learns_the_preference_and_goes_on_where_it_was(tmp_path: Path, engine: Any) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_pairs(tmp_path / "tokens")
    config = TrainingConfig(
        objective="dpo", rank=4, alpha=8, learning_rate=5e-3, micro_batch=4, num_epochs=6, engine=engine,
        eval_every_steps=6, checkpoint_every_steps=5, dropout=0.0,
    )  # fmt: skip

    def train(name: str, stop_after: int | None = None) -> tuple[list[StepRecord], list[EvalRecord], bytes | None]:
        steps: list[StepRecord] = []
        evals: list[EvalRecord] = []
        arguments: dict[str, Any] = {"seed": 0, "identity": "x", "on_step": steps.append, "on_eval": evals.append}
        if stop_after is not None:
            arguments["should_stop"] = lambda: len(steps) >= stop_after
            with pytest.raises(TrainingStopped):
                train_adapter(base_model, tokens, tmp_path / name, config, **arguments)
            return steps, evals, None
        outcome = train_adapter(base_model, tokens, tmp_path / name, config, **arguments)
        return steps, evals, (outcome.adapter / "adapter_model.safetensors").read_bytes()

    steps, evals, adapter = train("whole")
    assert steps[0].loss == pytest.approx(math.log(2), abs=1e-5)  # the adapter is nothing yet
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[-1].figures["reward_accuracy"] == 1.0
    assert evals[-1].step == 18
    assert evals[-1].figures.keys() == set(FIGURES)

    first, _, _ = train("cut", stop_after=7)
    reference = tmp_path / "cut" / "reference" / "reference.safetensors"
    kept = reference.read_bytes()
    rest, later, resumed = train("cut")
    assert [record.loss for record in first + rest] == [record.loss for record in steps]
    assert later[-1] == evals[-1]
    assert resumed == adapter
    assert reference.read_bytes() == kept

    reference.write_bytes(kept[:-4])
    train("cut")  # with the adapter off they are found again
    assert reference.read_bytes() == kept


def test_weights_of_the_model_itself_that_have_moved_give_no_reference(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_pairs(tmp_path / "tokens")
    config = TrainingConfig(objective="dpo", method="full", micro_batch=4, max_steps=2, checkpoint_every_steps=1)
    arguments: dict[str, Any] = {"seed": 0, "identity": "x"}
    train_adapter(base_model, tokens, tmp_path / "run", config, **arguments)
    (tmp_path / "run" / "reference" / "reference.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"reference\.safetensors: .* are gone or damaged: delete .*checkpoints"):
        train_adapter(base_model, tokens, tmp_path / "run", config, **arguments)


def test_another_machine_goes_on_with_what_the_model_began_as(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_pairs(tmp_path / "tokens")
    config = TrainingConfig(objective="dpo", method="full", micro_batch=4, max_steps=4, learning_rate=1e-3)
    arguments: dict[str, Any] = {"seed": 0, "identity": "x"}
    whole: list[StepRecord] = []
    train_adapter(base_model, tokens, tmp_path / "whole", config, on_step=whole.append, **arguments)
    place = open_place(str(tmp_path / "shared"))
    seen: list[StepRecord] = []
    with pytest.raises(TrainingStopped):
        train_adapter(
            base_model, tokens, tmp_path / "one", config, on_step=seen.append, place=place,
            should_stop=lambda: len(seen) >= 2, **arguments,
        )  # fmt: skip
    outcome = train_adapter(base_model, tokens, tmp_path / "two", config, on_step=seen.append, place=place, **arguments)
    assert outcome.resumed_from_step == 2
    assert [record.loss for record in seen] == [record.loss for record in whole]
    kept = [tmp_path / name / "reference" / "reference.safetensors" for name in ("one", "two", "whole")]
    assert len({path.read_bytes() for path in kept}) == 1


def test_rows_without_a_rejected_answer_are_named(tmp_path: Path) -> None:
    tokens = write_pairs(tmp_path / "tokens")
    table = pq.read_table(tokens / "train.parquet")
    lists = table["rejected_ids"].to_pylist()
    lists[3] = None
    place = table.schema.get_field_index("rejected_ids")
    changed = table.set_column(place, "rejected_ids", pa.array(lists, pa.list_(pa.int32())))
    pq.write_table(changed, tokens / "train.parquet")
    config = TrainingConfig(objective="dpo", rank=4)
    with pytest.raises(TrainingError, match=r"example train-3: no rejected answer"):
        prepare_training(build_family(tmp_path / "model", "llama"), tokens, tmp_path / "x", config, seed=0)
    pq.write_table(table.drop_columns(["rejected_ids", "rejected_labels"]), tokens / "train.parquet")
    with pytest.raises(TrainingError, match="no row has a rejected answer"):
        prepare_training(tmp_path / "model", tokens, tmp_path / "x", config, seed=0)
