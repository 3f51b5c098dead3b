"""Several trainings on one frozen model: the fused engine with a lane for each, see `tasks.decoder.lanes`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from schemas.config import TrainingConfig
from tasks.decoder.attention import Segments
from tasks.decoder.lanes import LanePlaces, bind_lanes, put_side_by_side
from tasks.decoder.recognition import UnknownDecoderError
from tasks.training.adamw import count_moment_bytes
from tasks.training.batches import Batch
from tasks.training.engines.engine import Engine
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.memory_fit import fit_memory
from tasks.training.lora import list_adapters
from tasks.training.token_table import TokenTable

__all__ = ["LaneEngine", "UnknownDecoderError", "build_lanes"]


@dataclass(frozen=True)
class LaneEngine:
    """The fused engine, whose passes hold a batch of each lane."""

    engine: FusedEngine
    places: LanePlaces

    @property
    def tokens_per_lane(self) -> int:
        """Tokens of a lane's batch."""
        return max(1, self.engine.tokens_per_forward // self.places.number)

    def form_step(self, table: TokenTable, rows: Sequence[Sequence[int]]) -> list[Batch]:
        """Lay one lane's examples of a step end to end."""
        return replace(self.engine, tokens_per_forward=self.tokens_per_lane).form_step(table, rows)

    def form_evaluation(self, table: TokenTable) -> Any:
        """Make batches of all examples, small enough to go through as many times as there are lanes."""
        return replace(self.engine, room_tokens=self.tokens_per_lane).form_evaluation(table)

    def compute_log_probs(self, batches: Sequence[Batch | None]) -> list[Tensor]:
        """Return the log-probabilities [N] of each lane's batch; nothing of a lane without one."""
        given = [batch for batch in batches if batch is not None]
        tokens = [0 if batch is None else batch.input_ids.shape[1] for batch in batches]
        chosen = [0 if batch is None or batch.trained is None else len(batch.trained) for batch in batches]
        self.places.set(tokens, chosen, device=self.engine.device)
        return list(self.engine.compute_log_probs(_join(given)).split(chosen))

    def attach_to(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the working copies of what is trained anew after each step."""
        self.engine.attach_to(optimizer)

    def bind_gradients(self) -> list[Tensor | None]:
        """Give each lane gradients that stay where they are, as one vector."""
        return bind_lanes(self.engine.decoder)

    def describe(self) -> str:
        """Say how it computes."""
        return f"{self.engine.describe()}, {self.places.number} adapters side by side"


def build_lanes(
    engine: Engine, model: PeftModel, names: Sequence[str], config: TrainingConfig, *, step_tokens: int
) -> LaneEngine:
    """Return an engine with a lane for each adapter of a model.

    Args:
        engine: that was chosen for the first adapter.
        model: with all adapters, on the device.
        names: of the adapters.
        config: the training section.
        step_tokens: most tokens of a step of one lane.

    Raises:
        UnknownDecoderError: this engine or model has no lanes.
    """
    if not isinstance(engine, FusedEngine) or engine.router_loss is not None:
        raise UnknownDecoderError("the fused engine does not train it")
    decoder, places = put_side_by_side(engine.decoder, [list_adapters(model, name) for name in names])
    engine = replace(engine, decoder=decoder, recorder=None)
    if engine.device.type == "cuda":
        trained: list[nn.Parameter] = [value for value in model.parameters() if value.requires_grad]
        engine = fit_memory(
            engine,
            trained=trained,
            most_tokens=step_tokens * len(names),
            recompute=config.gradient_checkpointing,
            moment_bytes=count_moment_bytes(config),
        )
        places.clear()
    else:
        tokens = engine.tokens_per_forward * len(names)
        engine = replace(engine, tokens_per_forward=tokens, room_tokens=tokens)
    return LaneEngine(engine, places)


def _join(batches: Sequence[Batch]) -> Batch:
    """Return one flat batch of several, one behind the other."""
    if len(batches) == 1:
        return batches[0]
    positions, segments, trained, starts = [], [], [], [0]
    for batch in batches:
        assert batch.position_ids is not None
        assert batch.segments is not None
        assert batch.trained is not None
        positions.append(batch.position_ids)
        segments.append(batch.segments)
        trained.append(batch.trained + starts[-1])
        starts.append(starts[-1] + batch.input_ids.shape[1])
    borders = [part.borders[1:] + start for part, start in zip(segments, starts, strict=False)]
    zero = segments[0].borders[:1]
    return replace(
        batches[0],
        input_ids=torch.cat([batch.input_ids for batch in batches], dim=1),
        targets=torch.cat([batch.targets for batch in batches], dim=1),
        position_ids=torch.cat(positions, dim=1),
        segments=Segments(
            torch.cat([zero, *borders]).to(zero.dtype), tuple(length for part in segments for length in part.lengths)
        ),
        trained=torch.cat(trained),
        example_ids=tuple(name for batch in batches for name in batch.example_ids),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_trained_tokens=sum(batch.num_trained_tokens for batch in batches),
        row_lengths=(),
    )
