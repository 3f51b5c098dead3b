"""A step that does not fit is done again in smaller micro batches, and the same sum is optimized."""

from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.config import TrainingConfig
from tasks.out_of_memory import is_out_of_memory
from tasks.training.checkpoints import Progress
from tasks.training.preparation import Setup, prepare_training
from tasks.training.records import EvalRecord, StepRecord, TrainingError
from tasks.training.steps import Run, do_step, evaluate, iterate, step_down

CONFIG = TrainingConfig(
    rank=4, alpha=8, learning_rate=1e-2, micro_batch=6, gradient_accumulation_steps=2, engine="general"
)


def prepare(base_model: Path, tokens: Path, *, most_tokens: int | None = None) -> Run:
    """Prepare a training on a machine whose memory holds so many tokens, padding included."""
    setup = prepare_training(base_model, tokens, tokens / "examples", CONFIG, seed=5)

    def refuse(module: Any, arguments: Any, options: dict[str, Any]) -> None:
        tokens = options["input_ids"].numel()
        if most_tokens is not None and tokens > most_tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} GiB.\nMore lines.")

    setup.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return Run(setup, Progress(), "this run")


def do_steps(run: Run, count: int) -> list[StepRecord]:
    steps, records = iterate(run), []
    for _ in range(count):
        record, steps = do_step(run, steps)
        records.append(record)
    return records


def values_of(setup: Setup) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in setup.parameters.values()])


def test_step_that_does_not_fit_is_done_in_smaller_pieces(base_model: Path, tokens: Path) -> None:
    roomy, tight = prepare(base_model, tokens), prepare(base_model, tokens, most_tokens=64)
    wanted, found = do_steps(roomy, 4), do_steps(tight, 4)
    assert [record.step for record in found] == [1, 2, 3, 4]
    assert [record.num_tokens for record in found] == [record.num_tokens for record in wanted]
    assert [record.loss for record in found] == pytest.approx([record.loss for record in wanted], abs=1e-5)
    assert [record.grad_norm for record in found] == pytest.approx([r.grad_norm for r in wanted], rel=1e-5)
    assert (values_of(tight.setup) - values_of(roomy.setup)).abs().max() < 1e-5
    # Recomputed, then half the tokens, then a quarter: the last holds.
    where = "general engine, up to {} tokens end to end a forward pass{}, one call for each example"
    recomputed = ", 2 layers recomputed"
    assert tight.setup.engine.describe() == where.format(62, recomputed)
    assert tight.setup.model.is_gradient_checkpointing
    assert not roomy.setup.model.is_gradient_checkpointing
    assert [text.partition("): went on with the ")[2] for text in tight.warnings] == [
        f"{where.format(tokens, recomputed)}, the same rows a step" for tokens in (249, 124, 62)
    ]
    beginning = f"step 1: out of memory with the {where.format(249, '')} (CUDA out of memory. Tried"
    assert tight.warnings[0].startswith(beginning)
    assert roomy.warnings == []


def test_evaluation_that_does_not_fit_is_done_in_smaller_pieces(base_model: Path, tokens: Path) -> None:
    records: list[EvalRecord] = []
    for most_tokens in (None, 64):
        run = prepare(base_model, tokens, most_tokens=most_tokens)
        run.progress = Progress(step=1, losses=[4.0])
        records.append(evaluate(run))
        assert run.setup.model.training
    assert records[1].loss == pytest.approx(records[0].loss, abs=1e-6)


def test_padded_passes_have_fewer_rows_where_they_do_not_fit(tmp_path: Path, tokens: Path) -> None:
    from tests.tasks.training.families import build_family

    model = build_family(tmp_path / "model", "gemma2")  # its attention has a soft cap: padded
    roomy, tight = prepare(model, tokens), prepare(model, tokens, most_tokens=60)
    wanted, found = do_steps(roomy, 2), do_steps(tight, 2)
    assert [record.loss for record in found] == pytest.approx([record.loss for record in wanted], abs=1e-5)
    assert "up to 6 rows side by side" in roomy.setup.engine.describe()
    assert "up to 1 row side by side" in tight.setup.engine.describe()
    assert len(tight.warnings) == 3


def test_one_row_that_does_not_fit_is_an_error_with_remedies(base_model: Path, tokens: Path) -> None:
    run = prepare(base_model, tokens, most_tokens=0)
    with pytest.raises(
        TrainingError, match=r"step 1: out of memory with the smallest forward pass \(CUDA .*set training"
    ):
        do_steps(run, 1)
    assert all(parameter.grad is None for parameter in run.setup.parameters.values())


def test_fused_engine_recomputes_before_it_halves(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"engine": "fused"})
    setup: Setup | None = prepare_training(base_model, tokens, tmp_path, config, seed=5)
    words = []
    while setup is not None:
        engine = setup.engine
        batches = engine.form_step(setup.table, setup.rows)
        words.append((engine.describe(), sum(batch.num_trained_tokens for batch in batches)))
        setup = step_down(setup)
    assert [text for text, _ in words] == [
        "fused engine, up to 249 tokens a forward pass, one call for each example",
        "fused engine, up to 249 tokens a forward pass, 2 layers recomputed, one call for each example",
    ]
    assert words[0][1] == words[1][1] > 0


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
