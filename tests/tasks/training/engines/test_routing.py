"""A trial's two ways through routed experts choose alike where only rounding parts them, and else each by itself."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tasks.training.batches import Batch, form_batch, form_flat_batch
from tasks.training.engines.routing import RouteRecorder, routed_as
from tasks.training.token_table import TokenTable

_LENGTHS = (20, 24)
_CHOSEN = 3


def make_table() -> TokenTable:
    ids = np.arange(sum(_LENGTHS), dtype=np.int32)
    targets = np.where(ids % 2 == 0, ids, -100).astype(np.int32)
    return TokenTable(["a", "b"], np.cumsum([0, *_LENGTHS]).astype(np.int64), ids, targets)


def draw_scores() -> Tensor:
    return torch.randn(sum(_LENGTHS), 16, generator=torch.Generator().manual_seed(0))


def record(scores: Tensor, num_layers: int = 2) -> tuple[Tensor, ...]:
    """Choose for one piece after the other, as the reference does."""
    recorder = RouteRecorder()
    for piece in scores.split(list(_LENGTHS)):
        with recorder.recording(len(piece)):
            for layer in range(num_layers):
                torch.topk(piece.roll(layer, dims=1), _CHOSEN, dim=-1)
    return recorder.join()


def spread(scores: Tensor, batch: Batch) -> Tensor:
    """Lay the scores where the batch has the tokens; other scores where it has none."""
    rows = torch.randn(batch.input_ids.numel(), scores.shape[1], generator=torch.Generator().manual_seed(1))
    width = batch.input_ids.shape[1]
    parts = scores.split(list(batch.row_lengths))
    for number, part in enumerate(parts):
        rows[number * width : number * width + len(part)] = part
    return rows


@pytest.mark.parametrize("is_flat", [True, False])
def test_near_ties_are_chosen_as_the_reference_did(is_flat: bool) -> None:
    table, scores = make_table(), draw_scores()
    batch = form_flat_batch(table, [0, 1]) if is_flat else form_batch(table, [[0], [1]])
    rows = spread(scores, batch)
    noise = 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    own = (rows + noise).topk(_CHOSEN, dim=-1)
    wanted = rows.topk(_CHOSEN, dim=-1)
    is_token = spread(torch.ones_like(scores), batch)[:, 0] == 1
    assert not torch.equal(own.indices, wanted.indices)
    with routed_as(record(scores), batch):
        values, indices = torch.topk(rows + noise, _CHOSEN, dim=-1)
        second = (rows + noise).roll(1, dims=1).topk(_CHOSEN).indices
    assert torch.equal(indices[is_token], wanted.indices[is_token])
    assert torch.equal(values, (rows + noise).gather(-1, indices))
    assert torch.equal(second[is_token], rows.roll(1, dims=1).topk(_CHOSEN).indices[is_token])
    assert torch.equal(indices[~is_token], own.indices[~is_token])


def test_the_last_layer_sees_the_trained_positions_first() -> None:
    table, scores = make_table(), draw_scores()
    batch = form_flat_batch(table, [0, 1])
    assert batch.trained is not None
    assert len(batch.trained) == batch.input_ids.numel()  # their number does not tell which rows they are
    rows = spread(scores, batch)[batch.trained]
    noise = 0.05 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(2))
    is_token = batch.trained < batch.num_tokens
    with routed_as(record(scores), batch):
        indices = (rows + noise).topk(_CHOSEN).indices
    assert torch.equal(indices[is_token], rows.topk(_CHOSEN).indices[is_token])


def test_a_way_that_routes_otherwise_keeps_its_choices() -> None:
    table, scores = make_table(), draw_scores()
    batch = form_flat_batch(table, [0, 1])
    rows = spread(scores, batch).flip(1)
    with routed_as(record(scores), batch):
        assert torch.equal(rows.topk(_CHOSEN).indices, rows.sort(descending=True).indices[:, :_CHOSEN])


def test_groups_of_experts_are_chosen_for_each_token() -> None:
    table, scores = make_table(), draw_scores()
    batch = form_flat_batch(table, [0, 1])
    recorder = RouteRecorder()
    for piece in scores.split(list(_LENGTHS)):
        with recorder.recording(len(piece)):
            piece.view(-1, 4, 4).topk(2, dim=-1)
    noise = 0.05 * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))
    rows = spread(scores + noise, batch)
    with routed_as(recorder.join(), batch):
        indices = rows.view(-1, 4, 4).topk(2, dim=-1).indices
    assert torch.equal(indices[: len(scores)], scores.view(-1, 4, 4).topk(2, dim=-1).indices)


def test_pieces_that_went_different_ways_give_nothing() -> None:
    recorder = RouteRecorder()
    with recorder.recording(4):
        torch.topk(torch.randn(4, 8), 2)
    with recorder.recording(4):
        pass
    assert recorder.join() == ()
