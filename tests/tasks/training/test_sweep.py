"""Candidates of a sweep end as they would by themselves, and the best of them is taken without pretending."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from schemas.config import SweepConfig, TrainingConfig
from tasks.training import sweep
from tasks.training.candidates import list_settings
from tasks.training.choosing import Candidate, choose, estimate_optimism
from tasks.training.loop import train_adapter
from tasks.training.place import open_place
from tasks.training.process.messages import describe_outcome, read_outcome
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingStopped
from tasks.training.schedule import compute_learning_rate
from tests.tasks.training.conftest import write_tokens
from tests.tasks.training.families import build_family
from tests.tasks.training.test_preferences import write_pairs

SWEEP = SweepConfig(learning_rates=(5e-3, 1e-2), ranks=(2, 4))


def train(folder: Path, base_model: Path, tokens: Path, config: TrainingConfig, seed: int = 3, **more: Any) -> Any:
    """Train, and return the outcome with the records of steps and evaluations."""
    steps: list[StepRecord] = []
    evals: list[EvalRecord] = []
    outcome = train_adapter(
        base_model, tokens, folder, config, seed=seed, identity="x",
        **{"on_step": steps.append, "on_eval": evals.append, **more},
    )  # fmt: skip
    return outcome, steps, evals


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_each_candidate_ends_as_it_would_by_itself(tmp_path: Path, objective: Any) -> None:
    base_model = build_family(tmp_path / "model", "llama")
    tokens = write_tokens(tmp_path / "tokens", num_train=14) if objective == "sft" else write_pairs(tmp_path / "tokens")
    config = TrainingConfig(
        objective=objective,
        rank=4,
        alpha=8,
        micro_batch=4,
        num_epochs=2,
        engine="fused",
        sweep=SWEEP,
        eval_every_steps=4,
    )
    outcome, steps, evals = train(tmp_path / "sweep", base_model, tokens, config)
    assert outcome.sweep is not None
    assert "side by side" in outcome.engine
    losses = {}
    for name, own, seed in list_settings(config, 3):
        alone, own_steps, own_evals = train(tmp_path / name, base_model, tokens, own, seed)
        losses[name] = own_evals[-1].loss
        assert [record.figures[f"{name}/loss"] for record in steps] == pytest.approx(
            [record.loss for record in own_steps], rel=1e-5
        )
        assert [record.figures[f"{name}/learning_rate"] for record in steps] == [r.learning_rate for r in own_steps]
        assert [record.figures[f"{name}/loss"] for record in evals] == pytest.approx(
            [record.loss for record in own_evals], rel=1e-5
        )
        if name == outcome.sweep.winner:
            mine, theirs = (load_file(each.adapter / "adapter_model.safetensors") for each in (outcome, alone))
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                assert float((mine[key] - value).norm()) <= 1e-5 * float(value.norm())
            configs = [(each.adapter / "adapter_config.json").read_text() for each in (outcome, alone)]
            assert configs[0] == configs[1]
    assert outcome.sweep.winner == min(losses, key=lambda name: losses[name])
    assert len(set(losses.values())) == 4
    assert outcome.sweep.corrected_loss >= outcome.sweep.loss
    assert read_outcome(describe_outcome(outcome)) == outcome


def test_interrupted_sweep_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_tokens(tmp_path / "tokens", num_train=12)
    config = TrainingConfig(
        rank=4, alpha=8, micro_batch=4, num_epochs=3, engine="fused", checkpoint_every_steps=2,
        sweep=SweepConfig(learning_rates=(1e-3, 1e-2), seeds=(0, 1)),
    )  # fmt: skip
    whole, steps, _ = train(tmp_path / "whole", base_model, tokens, config)
    seen: list[StepRecord] = []
    with pytest.raises(TrainingStopped):
        train(tmp_path / "cut", base_model, tokens, config, on_step=seen.append, should_stop=lambda: len(seen) >= 5)
    rest, later, _ = train(tmp_path / "cut", base_model, tokens, config)
    assert rest.resumed_from_step == 5
    assert [record.figures for record in seen + later] == [record.figures for record in steps]
    assert rest.sweep == whole.sweep
    assert (rest.adapter / "adapter_model.safetensors").read_bytes() == (
        whole.adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_another_machine_goes_on_and_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_tokens(tmp_path / "tokens", num_train=12)
    config = TrainingConfig(
        rank=4, alpha=8, micro_batch=4, num_epochs=3, engine="fused", checkpoint_every_steps=2,
        sweep=SweepConfig(learning_rates=(1e-3, 1e-2)),
    )  # fmt: skip
    whole, steps, _ = train(tmp_path / "whole", base_model, tokens, config)
    place = open_place(str(tmp_path / "shared"))
    seen: list[StepRecord] = []
    with pytest.raises(TrainingStopped):
        train(
            tmp_path / "one", base_model, tokens, config, on_step=seen.append, should_stop=lambda: len(seen) >= 5,
            place=place,
        )  # fmt: skip
    newest = place.below("checkpoints/step-000005")
    newest.write_text("trained.safetensors", "damaged")
    rest, later, _ = train(tmp_path / "two", base_model, tokens, config, place=place)
    assert rest.resumed_from_step == 4
    assert "checkpoint step-000005 is damaged" in rest.warnings[0]
    assert train(tmp_path / "two", base_model, tokens, config, place=place)[0].warnings == rest.warnings
    assert [record.figures for record in seen[:4] + later] == [record.figures for record in steps]
    assert rest.sweep == whole.sweep


@pytest.mark.parametrize(("eval_every_steps", "why"), [(9, "step 2: loss nan, "), (1, "step 1: held-out loss nan")])
def test_a_candidate_that_breaks_is_given_up_for_good_and_the_others_are_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every_steps: int, why: str
) -> None:
    def break_it(step: int, num_steps: int, config: TrainingConfig) -> float:
        return compute_learning_rate(step, num_steps, config) * (1e30 if config.learning_rate == 1 else 1)

    monkeypatch.setattr(sweep, "compute_learning_rate", break_it)
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_tokens(tmp_path / "tokens", num_train=12)
    config = TrainingConfig(
        rank=4, alpha=8, micro_batch=4, num_epochs=3, engine="fused", checkpoint_every_steps=2,
        eval_every_steps=eval_every_steps, sweep=SweepConfig(learning_rates=(1e-2, 1.0)),
    )  # fmt: skip
    seen: list[StepRecord] = []
    with pytest.raises(TrainingStopped):
        train(tmp_path / "cut", base_model, tokens, config, on_step=seen.append, should_stop=lambda: len(seen) >= 5)
    rest, later, evals = train(tmp_path / "cut", base_model, tokens, config)
    assert rest.resumed_from_step == 5
    good, broken = rest.sweep.candidates
    assert rest.sweep.winner == good.name
    assert broken.loss is None
    assert broken.failure.startswith(why)
    assert not [warning for warning in rest.warnings if "given up" in warning]  # it was said when it happened
    name, own, seed = list_settings(config, 3)[0]
    own_steps = train(tmp_path / name, base_model, tokens, own, seed)[1]
    assert [record.figures[f"{name}/loss"] for record in seen + later] == pytest.approx(
        [record.loss for record in own_steps], rel=1e-5
    )
    assert not [key for record in [*later, *evals] for key in record.figures if key.startswith(broken.name)]
    hopeless = config.model_copy(update={"sweep": SweepConfig(learning_rates=(1.0,), seeds=(0, 1))})
    with pytest.raises(TrainingError, match="every candidate of the sweep was given up"):
        train(tmp_path / "hopeless", base_model, tokens, hopeless)


def test_a_finished_sweep_that_was_not_told_is_told_whole(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_tokens(tmp_path / "tokens", num_train=12)
    config = TrainingConfig(
        rank=4, alpha=8, micro_batch=4, num_epochs=1, engine="fused", sweep=SweepConfig(learning_rates=(1e-3, 1e-2))
    )
    whole, _, _ = train(tmp_path / "run", base_model, tokens, config)
    again, steps, _ = train(tmp_path / "run", base_model, tokens, config)
    assert steps == []
    assert again.sweep == whole.sweep
    assert again.sweep.corrected_loss is not None


def test_what_has_no_lanes_is_trained_in_turn_with_the_same_report(tmp_path: Path) -> None:
    base_model, tokens = build_family(tmp_path / "model", "llama"), write_tokens(tmp_path / "tokens", num_train=8)
    config = TrainingConfig(
        rank=4, alpha=8, micro_batch=4, max_steps=3, engine="general", sweep=SweepConfig(learning_rates=(1e-3, 1e-2))
    )
    outcome, steps, evals = train(tmp_path / "sweep", base_model, tokens, config)
    assert outcome.sweep is not None
    assert [each.learning_rate for each in outcome.sweep.candidates] == [1e-3, 1e-2]
    assert outcome.sweep.corrected_loss is None
    assert outcome.adapter.parent.name == outcome.sweep.winner
    assert {name for record in steps for name in record.figures} >= {"lr-0.001-rank-4-seed-3/loss"}
    assert len(evals) >= 2
    (tokens / "eval.parquet").unlink()
    for engine in ("general", "fused"):
        with pytest.raises(TrainingError, match="chooses by held-out loss"):
            train(tmp_path / engine, base_model, tokens, config.model_copy(update={"engine": engine}))


def test_the_smallest_of_equal_candidates_is_corrected_upwards() -> None:
    generator = np.random.default_rng(0)
    gaps, optimism = [], []
    for _ in range(40):
        noise = generator.normal(1.0, 0.5, (8, 60))
        losses = np.stack([noise, np.ones_like(noise)], axis=2)
        gaps.append(1.0 - noise.mean(axis=1).min())
        optimism.append(estimate_optimism(losses))
    assert np.mean(gaps) > 0.08  # the best of eight equal ones looks better than it is
    assert 0.5 * np.mean(gaps) < np.mean(optimism) < 1.6 * np.mean(gaps)
    assert estimate_optimism(losses[:1]) == 0.0


def test_choice_is_said_in_words() -> None:
    settings = list_settings(TrainingConfig(sweep=SWEEP), 0)
    candidates = [Candidate(*each) for each in settings]
    for number, candidate in enumerate(candidates):
        record = EvalRecord(1, 1, 1.0, 2.0 - 0.1 * number, 1.0, is_best=True)
        candidate.progress = replace(candidate.progress, evaluations=[record])
    candidates[3].progress.failure = "step 2: loss nan"
    report = choose(candidates)
    assert report.winner == "lr-0.01-rank-2-seed-0"
    assert report.sentence == "lr-0.01-rank-2-seed-0 has the smallest held-out loss of 4 candidates: 1.8000"
    assert settings[1][1].alpha / settings[1][1].rank == TrainingConfig().alpha / TrainingConfig().rank
