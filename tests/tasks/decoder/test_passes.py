"""Small batches filled up to a few shapes: the same sum and the same gradient, whatever is filled up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.decoder.attention import Segments
from tasks.decoder.decoder import LOGITS_BYTES, compute_losses
from tasks.decoder.layer import Layer
from tasks.decoder.passes import (
    MOST_TOKENS,
    FlatBatch,
    Shape,
    _lay_out,
    choose_shape,
    count_flop,
    count_recorded,
    fill_up,
)
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.lora import collect_trained
from tests.tasks.decoder.small_models import build, draw_table


def flatten(lengths: tuple[int, ...]) -> FlatBatch:
    batch = form_flat_batch(draw_table(lengths), range(len(lengths)))
    assert batch.segments is not None
    assert batch.trained is not None
    assert batch.position_ids is not None
    targets = batch.targets[0].index_select(0, batch.trained)
    return FlatBatch(batch.input_ids[0], batch.position_ids[0], batch.segments.lengths, batch.trained, targets)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((64, 64, 2), (256, 64, 8)),
        ((248, 10, 1), (256, 64, 8)),
        ((249, 81, 1), (320, 160, 8)),
        ((2000, 700, 17), (2048, 1024, 24)),
        ((2041, 641, 17), (2560, 1280, 24)),
        ((2560, 2560, 24), (3072, 3072, 32)),
    ],
)
def test_shapes_by_hand(sizes: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert choose_shape(*sizes, longest=512) == expected


def test_passes_of_large_models_are_not_recorded() -> None:
    def shape(hidden: int, intermediate: int, num_layers: int, weights: object = None) -> SimpleNamespace:
        sizes = ((hidden, 2 * hidden), (hidden, 2 * intermediate), (intermediate, hidden), (hidden, hidden))
        groups = [
            SimpleNamespace(joint_a=torch.empty(64, num_in, device="meta"), joint_b=torch.empty(out, 64, device="meta"))
            for num_in, out in sizes
        ]
        layer: Any = SimpleNamespace(projections=[SimpleNamespace(adapters=group) for group in groups], experts=None)
        layer.num_weights = Layer.num_weights.fget(layer)  # type: ignore[attr-defined]
        return SimpleNamespace(layers=[layer] * num_layers, weights=weights)

    def count_most(decoder: Any) -> int:
        return count_recorded(len(decoder.layers), count_flop(decoder))

    small: Any = shape(1024, 3072, 28)
    large: Any = shape(3584, 18944, 28)
    assert count_most(small) == MOST_TOKENS
    # 4 * 242 million weights of a layer at 6e14 FLOP a second are 1.6 microseconds a token: 2 ms are 1,238 tokens.
    assert count_most(large) == 1238
    # With their own gradients 6 * 242 million: 825 tokens.
    trained: Any = shape(3584, 18944, 28, weights=object())
    assert count_most(trained) == 825


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=40),
    longest=st.integers(300, 4096),
)
def test_what_is_filled_up_is_a_whole_batch_of_the_shape(lengths: list[int], longest: int) -> None:
    batch = flatten(tuple(lengths))
    shape = choose_shape(len(batch.input_ids), len(batch.trained), len(batch.lengths), longest=longest)
    filled = fill_up(batch, shape)
    assert Shape(len(filled.input_ids), len(filled.trained), len(filled.lengths)) == shape
    assert len(filled.positions) == sum(filled.lengths) == shape.num_tokens
    assert 1 <= min(filled.lengths) <= max(filled.lengths) <= longest
    assert shape.num_tokens <= max(256, 1.25 * len(batch.input_ids) + 64)
    assert len(set(filled.trained.tolist())) == len(filled.trained) == len(filled.targets)
    starts = np.cumsum([0, *filled.lengths[:-1]])
    for start, length in zip(starts, filled.lengths, strict=True):
        assert filled.positions[start : start + length].tolist() == list(range(length))
    assert (filled.targets[len(batch.targets) :] < 0).all()


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_sum_and_the_gradient_stay_the_same(family: str) -> None:
    model = build(family, torch.float64)
    decoder = recognize_decoder(model)
    decoder.refresh()
    parameters = collect_trained(model)
    batch = flatten((17, 3, 40, 9, 121))
    results = []
    for flat in (batch, fill_up(batch, choose_shape(len(batch.input_ids), len(batch.trained), 6, longest=128))):
        segments = Segments(torch.tensor(np.cumsum([0, *flat.lengths]), dtype=torch.int32), flat.lengths)
        loss = compute_losses(
            decoder, flat.input_ids, flat.positions, segments, flat.trained, flat.targets, logits_bytes=LOGITS_BYTES
        ).sum()
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in parameters.values())])
        for parameter in parameters.values():
            parameter.grad = None
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


def test_a_batch_lies_in_one_buffer() -> None:
    batch = fill_up(flatten((5, 7)), Shape(256, 64, 9))
    words = _lay_out(batch, 0.125)
    ids, positions, trained, targets, borders, scale = words.split((256, 256, 64, 64, 5, 1))
    for left, right in ((ids, batch.input_ids), (positions, batch.positions), (trained, batch.trained)):
        assert torch.equal(left, right)
    assert torch.equal(targets, batch.targets)
    assert borders.view(torch.int32).tolist() == np.cumsum([0, *batch.lengths]).tolist()
    assert scale.view(torch.float32)[0] == 0.125
