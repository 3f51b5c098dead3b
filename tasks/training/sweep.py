"""A sweep: several learning rates, ranks and seeds over one frozen model, side by side in one pass, and the best one.

Each candidate has the rows, the order, the start, the optimizer and the learning rates that it would have by itself,
and ends with the adapter that it would have by itself; the products with the frozen weights are made for all of them
at once. Where the fused engine has no lanes for a model or a setting, they are trained one after the other.

The one with the smallest held-out loss is taken. Of several noisy losses the smallest is small by chance too: by how
much is estimated by choosing again in resamples of the held-out examples (Efron, 1983), and said along.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from schemas.config import TrainingConfig
from tasks.speeds import name_device
from tasks.training.adamw import build_adamw
from tasks.training.batches import Batch
from tasks.training.candidates import list_settings
from tasks.training.checkpoints import Snapshot, find_checkpoint
from tasks.training.choosing import Candidate, choose
from tasks.training.distributed import world_size
from tasks.training.engines.side_by_side import LaneEngine, UnknownDecoderError, build_lanes
from tasks.training.held_out_losses import compute_held_out
from tasks.training.in_turn import train_in_turn
from tasks.training.lora import attach_further, collect_trained, save_named
from tasks.training.memory import read_memory, reset_memory
from tasks.training.micro_batches import iterate_steps
from tasks.training.optimizers import WholeOptimizer
from tasks.training.place import Place
from tasks.training.preferences import find_reference
from tasks.training.preparation import Setup, prepare_training
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingOutcome, TrainingStopped
from tasks.training.schedule import compute_learning_rate
from tasks.training.sharding import is_sharded
from tasks.training.shared_checkpoints import bring_checkpoints
from tasks.training.steps import look_ahead
from tasks.training.sweep_checkpoints import restore_sweep, take_sweep
from tasks.training.token_parts import describe_parts, reading_parts
from tasks.training.writing import CheckpointWriter

logger = logging.getLogger(__name__)


def train_sweep(
    base_model: Path,
    tokens: Path,
    run_folder: Path,
    config: TrainingConfig,
    *,
    seed: int,
    identity: str,
    train: Callable[..., TrainingOutcome],
    on_step: Callable[[StepRecord], None] = lambda record: None,
    on_eval: Callable[[EvalRecord], None] = lambda record: None,
    should_stop: Callable[[], bool] = lambda: False,
    place: Place | None = None,
    tokens_address: str | None = None,
) -> TrainingOutcome:
    """Train all candidates of a config, going on from their newest checkpoint, and keep the best adapter.

    Args:
        base_model: as in `train_adapter`, like all that is not named here.
        tokens: see there.
        run_folder: gets adapter/ of the winner, and checkpoints/ of all together, or candidates/ with the folder of
            each where they are trained one after the other.
        config: with a sweep.
        seed: of candidates, where the sweep names none.
        identity: see there.
        train: `train_adapter`, for candidates that have to be trained one after the other.
        on_step: called once a step; its figures are the candidates', as name/curve.
        on_eval: the same.
        should_stop: see there.
        place: see there.
        tokens_address: see there.

    Raises:
        TrainingError: as there; there is no held-out example, or every candidate was given up.
    """
    candidates = [Candidate(*settings) for settings in list_settings(config, seed)]
    setup: Setup | None = None
    try:
        if world_size() > 1 or is_sharded(config):
            raise UnknownDecoderError("several processes train it")
        setup = prepare_training(
            base_model, tokens, run_folder / "examples", candidates[0].config, seed=candidates[0].seed,
            tokens_address=tokens_address,
        )  # fmt: skip
        if setup.eval_table is None:
            raise TrainingError(
                "training.sweep chooses by held-out loss, and there are no held-out examples: set data.eval_fraction"
            )
        lanes = _attach(setup, candidates)
    except UnknownDecoderError as error:
        logger.warning("The candidates of the sweep are trained one after the other: %s", error)
        if setup is not None and setup.table.parts is not None:
            setup.table.parts.close()
        del setup
        arguments: dict[str, Any] = {
            "identity": identity, "should_stop": should_stop, "tokens_address": tokens_address
        }  # fmt: skip
        listeners: dict[str, Callable[[Any], None]] = {"on_step": on_step, "on_eval": on_eval}
        return train_in_turn(base_model, tokens, run_folder, candidates, train, arguments, listeners, place)
    logger.info("Training with the %s", lanes.describe())
    run = _Sweep(setup, lanes, candidates, run_folder, identity, place)
    with reading_parts(setup.table.parts):
        run.begin()
        with CheckpointWriter(run.saved, keep=config.keep_checkpoints, place=place) as writer:
            run.train(writer, on_step, on_eval, should_stop)
        if (parts := setup.table.parts) is not None:
            logger.info(describe_parts([parts.counts], len(parts)))
        return run.end()


def _attach(setup: Setup, candidates: Sequence[Candidate]) -> LaneEngine:
    """Put the further candidates' adapters beside the first one's, and return the engine for all.

    Raises:
        UnknownDecoderError: there is none.
    """
    if not candidates[0].config.is_lora or candidates[0].config.use_dora or candidates[0].config.modules_to_save:
        raise UnknownDecoderError("it is not plain LoRA")
    for number, candidate in enumerate(candidates[1:], start=1):
        attach_further(setup.model, _name(number), candidate.config, seed=candidate.seed)
    setup.model.to(setup.device)
    lengths = sorted((int(setup.table.lengths[list(row)].sum()) for row in setup.rows), reverse=True)
    rows = setup.config.rows_per_step
    names = [_name(number) for number in range(len(candidates))]
    return build_lanes(setup.engine, setup.model, names, setup.config, step_tokens=sum(lengths[:rows]))


def _name(number: int) -> str:
    """Return PEFT's name of a candidate's adapter."""
    return "default" if number == 0 else f"candidate{number}"


@dataclass
class _Sweep:
    """Candidates under way, side by side."""

    setup: Setup
    lanes: LaneEngine
    candidates: list[Candidate]
    run_folder: Path
    identity: str
    place: Place | None = None
    step: int = 0
    resumed_from_step: int | None = None
    peak_memory_bytes: int = 0
    parameters: list[dict[str, nn.Parameter]] = field(default_factory=list)
    optimizers: list[WholeOptimizer] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    """Damaged checkpoints, over all attempts."""

    @property
    def saved(self) -> Path:
        """Folder of the checkpoints."""
        return self.run_folder / "checkpoints"

    def begin(self) -> None:
        """Make the optimizers, and go on from the newest checkpoint."""
        trained = collect_trained(self.setup.model)
        flats = self.lanes.bind_gradients()
        for number, (candidate, flat) in enumerate(zip(self.candidates, flats, strict=True)):
            own = {name: value for name, value in trained.items() if f".{_name(number)}." in name}
            optimizer = build_adamw(list(own.values()), candidate.config)
            self.lanes.attach_to(optimizer)
            self.parameters.append(own)
            self.optimizers.append(WholeOptimizer(own, optimizer, candidate.config.max_grad_norm, flat))
        brought = bring_checkpoints(self.place, self.saved, with_best=False) if self.place is not None else []
        checkpoint, warnings = find_checkpoint(self.saved, self.identity)
        self.passed_over = [*brought, *warnings]
        if checkpoint is not None:
            self.step = restore_sweep(checkpoint, self.candidates, self.parameters, self.optimizers)
            self.resumed_from_step = self.step
            earlier = self.candidates[0].progress.warnings
            self.passed_over[:0] = [warning for warning in earlier if warning not in self.passed_over]
            logger.info("Resuming from step %d of %d", self.step, self.setup.num_steps)
        if self.setup.config.is_paired:
            assert self.setup.eval_table is not None
            tables = {"train": self.setup.table, "eval": self.setup.eval_table}
            found_tables = find_reference(
                self.run_folder, self.identity, tables, self.setup.model, self.setup.engine, self.setup.config,
                has_begun=checkpoint is not None, place=self.place,
            )  # fmt: skip
            self.setup = replace(self.setup, table=found_tables["train"], eval_table=found_tables["eval"])

    def train(
        self,
        writer: CheckpointWriter,
        on_step: Callable[[StepRecord], None],
        on_eval: Callable[[EvalRecord], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Do the remaining steps.

        Raises:
            TrainingStopped: `should_stop` said so; a checkpoint was written.
        """
        setup = self.setup
        steps = look_ahead(zip(*(self._iterate(candidate) for candidate in self.candidates), strict=True))
        while self.step < setup.num_steps:
            if should_stop():
                writer.write(self._take_snapshot())
                raise TrainingStopped(f"stopped after step {self.step} of {setup.num_steps}")
            reset_memory(setup.device)
            started = time.perf_counter()
            batches = list(next(steps))
            told = self._descend(batches)
            self.step += 1
            on_step(self._record(batches, told, time.perf_counter() - started))
            is_last = self.step == setup.num_steps
            if self.step % setup.eval_every_steps == 0 or is_last:
                on_eval(self._evaluate())
            if self.step % setup.config.checkpoint_every_steps == 0 or is_last:
                writer.write(self._take_snapshot())
            writer.check()

    def end(self) -> TrainingOutcome:
        """Save the winner, and say what came of all."""
        setup = self.setup
        if self.resumed_from_step == self.step:  # all steps were done before, and their losses were not kept
            self._compute_held_out()
        report = choose(self.candidates)
        number = [candidate.name for candidate in self.candidates].index(report.winner)
        winner = self.candidates[number]
        folder = save_named(setup.model, _name(number), self.run_folder / "adapter")
        logger.info(report.sentence)
        tokens = sum(candidate.progress.num_tokens for candidate in self.candidates)
        losses = winner.progress.losses
        return TrainingOutcome(
            adapter=folder,
            num_steps=self.step,
            final_loss=float(np.mean(losses[-max(1, len(losses) // 10) :])),
            best_eval_loss=min(record.loss for record in winner.progress.evaluations),
            adapter_step=self.step,
            resumed_from_step=self.resumed_from_step,
            num_examples=len(setup.table.group_lengths),
            num_packs=len(setup.rows),
            packing_efficiency=1.0,
            num_trained_tokens=winner.progress.num_trained_tokens,
            num_trainable_parameters=sum(value.numel() for value in self.parameters[number].values()),
            tokens_per_second=tokens / max(self.candidates[0].progress.train_seconds, 1e-9),
            peak_memory_bytes=self.peak_memory_bytes,
            adapted=setup.adapted,
            warnings=(*self.passed_over, *setup.notes),  # who was given up is said at once, and in the report of all
            engine=self.lanes.describe(),
            device=name_device(),
            flop_per_token=setup.flop_per_token,
            sweep=report,
        )

    def _iterate(self, candidate: Candidate) -> Iterator[list[Batch]]:
        """Give the batches of a candidate's remaining steps, as it would have them by itself."""
        return iterate_steps(
            self.setup.table, self.setup.rows, candidate.config, seed=candidate.seed, first=self.step,
            last=self.setup.num_steps, form_step=self.lanes.form_step,
        )  # fmt: skip

    def _descend(self, batches: list[list[Batch]]) -> list[tuple[float, float]]:
        """Do a step of every candidate that is not given up; return loss and gradient norm of each."""
        objective = self.setup.objective
        live = [[] if each.failure else own for each, own in zip(self.candidates, batches, strict=True)]
        sizes = [sum(objective.count(batch) for batch in own) or 1.0 for own in live]
        sums = [torch.zeros((), device=self.setup.device) for _ in live]
        for parts in zip_longest(*live):
            log_probs = self.lanes.compute_log_probs(parts)
            losses = [
                None if batch is None else objective.sum_losses(own, batch)
                for own, batch in zip(log_probs, parts, strict=True)
            ]
            terms = [loss / size for loss, size in zip(losses, sizes, strict=True) if loss is not None]
            torch.stack(terms).sum().backward()
            sums = [total if loss is None else total + loss.detach() for total, loss in zip(sums, losses, strict=True)]
        norms: list[Tensor] = []
        for candidate, own, adamw, total in zip(self.candidates, live, self.optimizers, sums, strict=True):
            if not own:
                norms.append(torch.zeros((), device=self.setup.device))
                continue
            adamw.sum(total)
            norms.append(adamw.clip())
            rate = compute_learning_rate(self.step, self.setup.num_steps, candidate.config)
            adamw.move(rate, torch.isfinite(total) & torch.isfinite(norms[-1]))
        found = torch.stack([torch.stack(sums), torch.stack(norms)]).tolist()
        told = [(total / size, norm) for total, norm, size in zip(*found, sizes, strict=True)]
        for candidate, own, (loss, norm) in zip(self.candidates, live, told, strict=True):
            if own and not (math.isfinite(loss) and math.isfinite(norm)):
                self._give_up(candidate, f"step {self.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}")
        return told

    def _give_up(self, candidate: Candidate, why: str) -> None:
        """Train a candidate no further.

        Raises:
            TrainingError: it was the last one.
        """
        candidate.progress.failure = why
        logger.warning("%s is given up: %s", candidate.name, why)
        if all(each.failure for each in self.candidates):
            raise TrainingError(
                f"every candidate of the sweep was given up, the last one at {why}: lower the rates, or set "
                "training.precision to fp32"
            )

    def _record(self, batches: list[list[Batch]], told: list[tuple[float, float]], seconds: float) -> StepRecord:
        """Count a step, and return it with each candidate's curves."""
        figures: dict[str, float] = {}
        num_tokens = num_trained = 0
        for candidate, own, (loss, norm) in zip(self.candidates, batches, told, strict=True):
            if candidate.failure:
                continue
            progress = candidate.progress
            progress.step = self.step
            progress.losses.append(loss)
            progress.num_tokens += sum(batch.num_tokens for batch in own)
            progress.num_trained_tokens += sum(batch.num_trained_tokens for batch in own)
            num_tokens += sum(batch.num_tokens for batch in own)
            num_trained += sum(batch.num_trained_tokens for batch in own)
            rate = compute_learning_rate(self.step - 1, self.setup.num_steps, candidate.config)
            figures |= {
                f"{candidate.name}/loss": loss,
                f"{candidate.name}/grad_norm": norm,
                f"{candidate.name}/learning_rate": rate,
            }
        for candidate in self.candidates:
            candidate.progress.train_seconds += seconds
        live = [pair for each, pair in zip(self.candidates, told, strict=True) if not each.failure]
        memory = read_memory(self.setup.device)
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory)
        return StepRecord(
            step=self.step,
            num_steps=self.setup.num_steps,
            epoch=self.step / self.setup.steps_per_epoch,
            loss=min(loss for loss, _ in live),
            learning_rate=compute_learning_rate(self.step - 1, self.setup.num_steps, self.setup.config),
            grad_norm=max(norm for _, norm in live),
            num_tokens=num_tokens,
            num_trained_tokens=num_trained,
            tokens_per_second=num_tokens / max(seconds, 1e-9),
            memory_bytes=memory,
            figures=figures,
        )

    def _evaluate(self) -> EvalRecord:
        """Compute each candidate's held-out loss; return the smallest, and all as figures."""
        live = [candidate for candidate in self.candidates if not candidate.failure]
        self._compute_held_out()
        for candidate in live:
            total, count = candidate.losses.sum(axis=0)
            progress = candidate.progress
            since = progress.losses[progress.evaluations[-1].step if progress.evaluations else 0 :]
            progress.evaluations.append(
                EvalRecord(
                    self.step,
                    self.setup.num_steps,
                    self.step / self.setup.steps_per_epoch,
                    float(total / count),
                    sum(since) / len(since),
                    is_best=all(total / count < earlier.loss for earlier in progress.evaluations),
                )
            )
            if not math.isfinite(total):
                self._give_up(candidate, f"step {self.step}: held-out loss {total / count:.4g}")
        best = min(self.candidates, key=lambda candidate: candidate.eval_loss)
        record = best.progress.evaluations[-1]
        figures = {f"{each.name}/loss": each.progress.evaluations[-1].loss for each in live if not each.failure}
        return replace(record, figures=figures)

    def _compute_held_out(self) -> None:
        """Compute the candidates' losses of the held-out examples."""
        assert self.setup.eval_table is not None
        is_live = [not candidate.failure for candidate in self.candidates]
        found = compute_held_out(self.setup.model, self.lanes, self.setup.objective, self.setup.eval_table, is_live)
        for candidate, losses in zip(self.candidates, found, strict=True):
            if losses is not None:
                candidate.losses = losses

    def _take_snapshot(self) -> Snapshot:
        """Copy what a checkpoint of all candidates holds."""
        self.candidates[0].progress.warnings = self.passed_over  # of all of them
        return take_sweep(self.step, self.identity, self.candidates, self.parameters, self.optimizers)
