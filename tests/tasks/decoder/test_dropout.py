"""The fused decoder's dropout: its masks, and that it is the dropout of PEFT's adapters under the same masks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from schemas.config import TrainingConfig
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.dropout import Dropout, derive_key, draw_kept, draw_words
from tasks.decoder.projections import Projection
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.self_check import dropping, try_model, verify
from tasks.training.lora import collect_trained
from tasks.training.micro_batches import iterate_steps
from tasks.training.reference import sum_losses
from tests.tasks.decoder.small_models import (
    FAMILIES,
    build,
    compute_fused,
    compute_reference,
    draw_table,
    list_examples,
    measure_difference,
    take_grads,
)

CPU = torch.device("cpu")


def make(p: float, key: int) -> Dropout:
    return Dropout(p, torch.tensor([key]))


def draw(p: float, key: int, site: int, *, rows: int = 2048, width: int = 1024) -> Tensor:
    """What is kept, as fp64 of mean 0 and variance 1."""
    kept = draw_kept(make(p, key).mask(site), torch.arange(rows), width).double()
    return (kept - (1 - p)) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize(
    ("key", "counter", "rounds", "words"),
    [  # the known answers that Random123 comes with
        (0, 0, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (-1, 0xFFFFFFFF, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (0, 0, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, 0xFFFFFFFF, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_words_are_philox(key: int, counter: int, rounds: int, words: tuple[int, ...]) -> None:
    counters = torch.full((1,), counter)
    drawn = draw_words(torch.tensor([key]), (counters, counters, counters, counters), rounds=rounds)
    assert tuple(int(word) for word in drawn) == words


def test_masks_keep_their_share_and_are_independent() -> None:
    """Sums of two million are within 4.5 of their standard deviations, of products as of the masks themselves."""
    first = draw(0.05, 7, 3)
    shifted = [(first[:, by:], first[:, : first.shape[1] - by]) for by in (1, 2, 3, 4, 8, 16)]
    rows = [(first[by:], first[:-by]) for by in (1, 2, 64)]
    others = [(first, draw(0.05, 7, 4)), (first, draw(0.05, 8, 3)), (first, draw(0.05, 7 + (1 << 32), 3))]
    ones = torch.ones_like(first)
    for left, right in [(first, ones), (draw(0.5, 1, 0), ones), *shifted, *rows, *others]:
        assert abs(float((left * right).sum())) < 4.5 * left.numel() ** 0.5
    # By column and by row as well: sums of squares of sums are themselves within their deviations.
    for axis in (0, 1):
        sums = first.sum(axis).square() / first.shape[axis]
        assert abs(float(sums.sum()) - sums.numel()) < 4.5 * (2 * sums.numel()) ** 0.5


def test_keys_tell_seeds_steps_and_micro_batches_apart() -> None:
    keys = [derive_key(seed, step, number) for seed in range(10) for step in range(30) for number in range(10)]
    assert len(set(keys)) == 3000
    assert derive_key(3, 4, 5) == derive_key(3, 4, 5)


def test_steps_carry_their_keys_wherever_a_training_begins() -> None:
    table, config = draw_table([9] * 12), TrainingConfig(micro_batch=2, gradient_accumulation_steps=2)
    rows = [[index] for index in range(12)]
    whole = [*iterate_steps(table, rows, config, seed=3, first=0, last=6)]
    resumed = [*iterate_steps(table, rows, config, seed=3, first=4, last=6)]
    assert [[batch.dropout_key for batch in step] for step in resumed] == [
        [derive_key(3, step, number) for number in range(2)] for step in (4, 5)
    ]
    assert [batch.dropout_key for batch in whole[4]] == [batch.dropout_key for batch in resumed[0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [0, 2, 3])
def test_loss_and_gradient_are_the_models_own_under_the_same_masks(family: str, recomputed: int) -> None:
    table = draw_table()
    model = build(family, torch.float32, dropout=0.2, use_rslora=family == "qwen2").eval()
    flat = replace(form_flat_batch(table, range(5)), dropout_key=derive_key(1, 2, 3))
    total = torch.zeros(())
    for example, first in zip(list_examples(table), table.offsets, strict=False):
        if len(example.input_ids) > 1:
            with dropping(model, make(0.2, flat.dropout_key), flat, first=int(first)):
                total = total + sum_losses(model, example)
    total.backward()
    grads = take_grads(model)
    plain_loss, plain_grads = compute_reference(model, table)
    loss, fused_grads = compute_fused(model, flat, recomputed=recomputed)
    assert loss == pytest.approx(float(total.detach()), rel=1e-6)
    assert measure_difference(fused_grads, grads) < 1e-5
    assert loss != pytest.approx(plain_loss, rel=1e-4)
    assert measure_difference(fused_grads, plain_grads) > 0.1


def test_some_layers_adapted() -> None:
    table = draw_table()
    model = build("qwen3", torch.float32, dropout=0.3, target_modules=("v_proj", "down_proj")).eval()
    flat = form_flat_batch(table, range(5))
    total = torch.zeros(())
    for example, first in zip(list_examples(table), table.offsets, strict=False):
        if len(example.input_ids) > 1:
            with dropping(model, make(0.3, 0), flat, first=int(first)):
                total = total + sum_losses(model, example)
    total.backward()
    grads = take_grads(model)
    loss, fused_grads = compute_fused(model, flat)
    assert loss == pytest.approx(float(total.detach()), rel=1e-6)
    assert measure_difference(fused_grads, grads) < 1e-5


def test_mean_over_keys_is_the_gradient_without_dropout() -> None:
    """With a small B the masks do not change what the layers after see, and the gradient is linear in them."""
    table = draw_table((12, 9))
    flat = form_flat_batch(table, [0, 1])
    gradients = []
    for p in (0.0, 0.3):
        model = build("qwen2", torch.float32, dropout=p)
        for name, parameter in collect_trained(model).items():
            if ".lora_B." in name:
                parameter.data *= 1e-3
        engine = FusedEngine(recognize_decoder(model), CPU, 4096, 0, LOGITS_BYTES, 4096)
        for key in range(200 if p else 1):
            engine.sum_losses(replace(flat, dropout_key=derive_key(0, key, 0))).backward()
            gradients.append(take_grads(model))
    exact, drawn = gradients[0], torch.stack(gradients[1:])
    error = float((drawn.var(0).sum() / len(drawn)) ** 0.5)
    assert error < 0.1 * float(exact.norm())
    assert float((drawn.mean(0) - exact).norm()) < 1.3 * error


def test_same_key_is_the_same_step_bit_by_bit_and_evaluation_does_not_drop() -> None:
    table = draw_table()
    model = build("qwen3", torch.float32, dropout=0.1)
    engine = FusedEngine(recognize_decoder(model), CPU, 4096, 0, LOGITS_BYTES, 4096)

    def compute(engine: FusedEngine, key: int) -> tuple[float, Tensor]:
        loss = engine.sum_losses(replace(form_flat_batch(table, range(5)), dropout_key=key))
        loss.backward()
        return float(loss.detach()), take_grads(model)

    loss, grads = compute(engine, 11)
    other_loss, _ = compute(engine, 12)
    for repeated in (engine, replace(engine, num_recomputed=3)):
        again_loss, again = compute(repeated, 11)
        assert again_loss == loss != other_loss
        assert torch.equal(again, grads)
    plain_loss, _ = compute_reference(model.eval(), table)
    with torch.no_grad():
        assert float(engine.sum_losses(form_flat_batch(table, range(5)))) == pytest.approx(plain_loss, rel=1e-6)


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_backward_pass_under_another_key_is_refused(recomputed: int) -> None:
    engine = FusedEngine(
        recognize_decoder(build("qwen2", torch.float32, dropout=0.1)), CPU, 4096, 0, LOGITS_BYTES, 4096
    )
    engine = replace(engine, num_recomputed=recomputed)
    batch = form_flat_batch(draw_table(), range(5))
    loss = engine.sum_losses(batch)
    engine.sum_losses(replace(batch, dropout_key=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_trial_finds_another_mask() -> None:
    table = draw_table()
    model = build("qwen3", torch.float32, dropout=0.05)
    expected = try_model(model, table, CPU, torch.float32)
    decoder = recognize_decoder(model)
    proven, notes = verify(model, decoder, table, expected, CPU, torch.float32)
    assert notes == []
    assert proven.dropout is not None
    assert proven.dropout.p == 0.05
    down = decoder.layers[1].down
    assert isinstance(down, Projection)
    wrong = replace(decoder.layers[1], down=replace(down, site=99))
    layers = (decoder.layers[0], wrong, *decoder.layers[2:])
    with pytest.raises(UnknownDecoderError, match="its gradient differs by 0"):
        verify(model, replace(decoder, layers=layers), table, expected, CPU, torch.float32)
