"""The Triton kernels against plain PyTorch, each alone, and all of them as the decoder's.

On a GPU, or without one in Triton's interpreter: `make test-kernels`.
"""

import os
import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tasks.decoder import elementwise, mixer_elementwise
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.dropout import MaskedTensor, derive_key
from tasks.decoder.elementwise import Heads
from tasks.decoder.recognition import recognize_decoder
from tasks.training import batches
from tasks.training.batches import Batch, form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tests.tasks.decoder.kernel_device import (
    COPIES,
    DEVICE,
    DTYPES,
    EVERYTHING,
    IS_INTERPRETED,
    NUM_ROWS,
    assert_masked,
    assert_same,
    copy,
    draw,
    load_kernels,
    make,
    needs_kernels,
    rooms,
)
from tests.tasks.decoder.small_models import (
    build,
    draw_table,
    measure_difference,
    take_grads,
)
from tests.tasks.decoder.test_own_weights import build as build_own
from tests.tasks.decoder.test_own_weights import compare as compare_own
from tests.tasks.decoder.test_own_weights import take_grads as take_own_grads

pytestmark = needs_kernels
# The masks of these sites take every way in which Triton could specialize a kernel for its arguments.
SITES = [0, 1, 16, 107]
# Each program of the rotation and of the norms has a family here, and each program that drops one that drops.
FAMILIES = [
    *("llama", "qwen3", "gemma3_text", "granite", "phi3", "glm4", "hunyuan_v1_dense", "olmo3", "gemma4_text"),
    *("qwen3_5_text", "qwen3_moe"),
]
DROPPING = FAMILIES if EVERYTHING else ["qwen3", "gemma3_text", "qwen3_5_text", "qwen3_moe"]


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return load_kernels()


@pytest.mark.parametrize("width", [64, 1000, 3584])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_kernels(kernels: ModuleType, width: int, dtype: torch.dtype) -> None:
    residual, delta, grad, other = (draw(NUM_ROWS, width, dtype=dtype) for _ in range(4))
    weight = torch.rand(width, device=DEVICE) + 0.5
    left, right = rooms(NUM_ROWS, width, dtype=dtype)
    total, rstd = kernels.add_norm(residual, delta, weight, 1e-6, left)
    wanted_total, wanted_rstd = elementwise.add_norm(residual, delta, weight, 1e-6, right)
    assert_same(total, wanted_total)
    assert_same(rstd, wanted_rstd)
    assert_same(left, right)
    for residual_grad in (other, None):
        left, right = rooms(NUM_ROWS, width, dtype=dtype)
        kernels.norm_backward(grad, total, rstd, weight, residual_grad, left)
        elementwise.norm_backward(grad, total, rstd, weight, residual_grad, right)
        assert_same(left, right)


@pytest.mark.parametrize(("rows", "width"), [(NUM_ROWS, 64), (130, 3), (1, 5000), (0, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_copied_to_and_from_other_columns(rows: int, width: int, dtype: torch.dtype) -> None:
    from tasks.decoder.copy_kernels import copy_rows

    values = draw(rows, width, dtype=dtype)
    (left, _), whole = rooms(rows, width, dtype=dtype), draw(rows, width + 8, dtype=dtype)
    copy_rows(values, left)
    assert torch.equal(left, values)
    assert (left.as_strided((rows, 64), (width + 64, 1), width) == 7).all()
    copy_rows(whole[:, 3 : width + 3], left)
    assert torch.equal(left, whole[:, 3 : width + 3])


@pytest.mark.parametrize("shape", [(2, 12, 6), (1, 1, 1), (3, 130, 65)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_kernels(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from tasks.decoder import causal_softmax, causal_softmax_kernels

    scores, grads = (draw(*shape, dtype=torch.float32) * 3 for _ in range(2))
    first = causal_softmax_kernels.causal_softmax(scores, 0.5, dtype)
    wanted = causal_softmax.causal_softmax(scores, 0.5, dtype)
    rest = scores, grads, wanted[1], draw(*shape[:2], dtype=torch.float32), 0.5, dtype
    found = *first, *causal_softmax_kernels.causal_softmax_backward(*rest)
    for left, right in zip(found, (*wanted, *causal_softmax.causal_softmax_backward(*rest)), strict=True):
        assert left.dtype == right.dtype
        assert_same(left, right)
    assert not found[0].triu(1)[:, : shape[2]].any()


@pytest.mark.parametrize(("rows", "width"), [(NUM_ROWS, 64), (1, 1000), (600, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_norms_weight(kernels: ModuleType, rows: int, width: int, dtype: torch.dtype) -> None:
    total, grad = draw(rows, width, dtype=dtype), draw(rows, width + 64, dtype=dtype)[:, :width]
    rstd = torch.rand(rows, device=DEVICE) + 0.5
    assert_same(kernels.sum_normed(grad, total, rstd), elementwise.sum_normed(grad, total, rstd), 1e-5)


@pytest.mark.parametrize(
    ("heads", "num_rotated"),
    [
        *((Heads(28, 4, 128), 128), (Heads(5, 1, 96), 96), (Heads(3, 3, 64), 64), (Heads(28, 4, 128), 96)),
        *((Heads(4, 2, 64, is_interleaved=True), 64), (Heads(4, 2, 128, is_interleaved=True), 64)),
        *((Heads(4, 2, 64, norms_after_rotation=True), 64), (Heads(3, 1, 80), 32)),
    ],
)
@pytest.mark.parametrize("has_norm", [False, True])
def test_rotation_kernels(kernels: ModuleType, heads: Heads, num_rotated: int, has_norm: bool) -> None:
    has_norm = has_norm and num_rotated == heads.size
    width = (heads.num_query + 2 * heads.num_key_value) * heads.size
    qkv = draw(NUM_ROWS, width)
    cos, sin = draw(NUM_ROWS, num_rotated // 2), draw(NUM_ROWS, num_rotated // 2)
    first, second = (torch.rand(heads.size, device=DEVICE) + 0.5 if has_norm else None for _ in range(2))
    results = kernels.rotate(qkv, heads, cos, sin, first, second, 1e-6)
    for result, wanted in zip(results, elementwise.rotate(qkv, heads, cos, sin, first, second, 1e-6), strict=True):
        assert_same(result, wanted)
    grads = (draw(*results[0].shape), draw(*results[1].shape), draw(*results[2].shape))
    for with_weights in {False, has_norm}:
        left, right = rooms(NUM_ROWS, width, 192)
        settings = heads, cos, sin, first, second, 1e-6
        sums = kernels.rotate_backward(grads, qkv, *settings, left, with_weights=with_weights)
        wanted_sums = elementwise.rotate_backward(grads, qkv, *settings, right, with_weights=with_weights)
        assert_same(left, right)
        if with_weights:
            assert sums[0].shape == (heads.size,)
            for found, wanted in zip(sums, wanted_sums, strict=True):
                assert_same(found, wanted)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("has_copy", COPIES)
def test_gate_kernels(kernels: ModuleType, activation: str, has_copy: bool) -> None:
    gate_up, grad = draw(NUM_ROWS, 2 * 5000), draw(NUM_ROWS, 5000)

    left, right = rooms(NUM_ROWS, 5000)
    quantized = copy(NUM_ROWS, 5000, has_copy)
    kernels.gate(gate_up, activation, left, quantized)
    elementwise.gate(gate_up, activation, right)
    assert_same(left, right)
    if quantized is not None:
        assert_same(quantized.values.float() * quantized.scales, right, 0.04)
    left, right = rooms(NUM_ROWS, 10000)
    quantized, again = copy(NUM_ROWS, 10000, has_copy), grad.clone()
    kernels.gate_backward(grad, gate_up, activation, left, quantized)
    elementwise.gate_backward(again, gate_up, activation, right)
    assert_same(left, right)
    assert_same(grad, again)
    if quantized is not None:
        assert_same(quantized.values.float() * quantized.scales, right, 0.04)


def test_cross_entropy_kernel(kernels: ModuleType) -> None:
    vocabulary = 20011 if IS_INTERPRETED else 151936  # two blocks and a part of one, or more
    logits = 3 * draw(4 * NUM_ROWS + 13, vocabulary)
    targets = torch.randint(0, vocabulary, (4 * NUM_ROWS + 13,), device=DEVICE)
    targets[::10] = -100
    again = logits.clone()
    losses, wanted = kernels.cross_entropy(logits, targets), elementwise.cross_entropy(again, targets)
    assert_same(losses, wanted)
    assert_same(logits, again)
    assert not losses[::10].any()
    assert not logits[::10].any()


@pytest.mark.parametrize("width", [24, 1000, 3584, 5000])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_are_the_plain_generators_bit_by_bit(
    kernels: ModuleType, width: int, site: int, dtype: torch.dtype
) -> None:
    for p in (1 / 65536, 0.05, 0.1, 0.5, 0.9):
        mask = make(p, site)
        values = torch.ones(NUM_ROWS, width, device=DEVICE, dtype=dtype)
        left, right = rooms(NUM_ROWS, width, dtype=dtype)
        kernels.drop(values, MaskedTensor(left, mask))
        elementwise.drop(values, MaskedTensor(right, mask))
        assert torch.equal(left, right)


@pytest.mark.parametrize("width", [64, 1000, 3584])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_copy", COPIES)
def test_norm_kernels_with_dropout(kernels: ModuleType, width: int, dtype: torch.dtype, has_copy: bool) -> None:
    residual, delta, grad, other, further = (draw(NUM_ROWS, width, dtype=dtype) for _ in range(5))
    weight, mask = torch.rand(width, device=DEVICE) + 0.5, make(0.1, 9)
    left, dropped = rooms(NUM_ROWS, width, dtype=dtype)
    plain, _ = rooms(NUM_ROWS, width, dtype=dtype)
    quantized = copy(NUM_ROWS, width, has_copy)
    total, rstd = kernels.add_norm(residual, delta, weight, 1e-6, left, quantized, MaskedTensor(dropped, mask))
    kernels.add_norm(residual, delta, weight, 1e-6, plain)
    assert_same(left, plain)
    assert_masked(dropped, left, mask)
    for residual_grad in (other, None):
        left, right = rooms(NUM_ROWS, width, dtype=dtype)
        quantized = copy(NUM_ROWS, width, has_copy)
        kernels.norm_backward(grad, total, rstd, weight, residual_grad, left, quantized, MaskedTensor(further, mask))
        elementwise.norm_backward(grad, total, rstd, weight, residual_grad, right, None, MaskedTensor(further, mask))
        assert_same(left, right)
        if quantized is not None:
            assert_same(quantized.values.float() * quantized.scales, right, 0.04)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [96, 5000])
@pytest.mark.parametrize("has_copy", COPIES)
def test_gate_kernels_with_dropout(kernels: ModuleType, activation: str, width: int, has_copy: bool) -> None:
    gate_up, grad, further = draw(NUM_ROWS, 2 * width), draw(NUM_ROWS, width), draw(NUM_ROWS, width)
    mask = make(0.1, 3)
    left, dropped = rooms(NUM_ROWS, width)
    plain, _ = rooms(NUM_ROWS, width)
    kernels.gate(gate_up, activation, left, copy(NUM_ROWS, width, has_copy), MaskedTensor(dropped, mask))
    kernels.gate(gate_up, activation, plain)
    assert_same(left, plain)
    assert_masked(dropped, left, mask)
    left, right = rooms(NUM_ROWS, 2 * width)
    quantized, again = copy(NUM_ROWS, 2 * width, has_copy), grad.clone()
    kernels.gate_backward(grad, gate_up, activation, left, quantized, MaskedTensor(further, mask))
    elementwise.gate_backward(again, gate_up, activation, right, None, MaskedTensor(further, mask))
    assert_same(left, right)
    assert_same(grad, again)
    assert torch.equal(grad == 0, again == 0)
    if quantized is not None:
        assert_same(quantized.values.float() * quantized.scales, right, 0.04)


def test_kernels_of_the_attentions_output(kernels: ModuleType) -> None:
    values, grad, side = draw(NUM_ROWS, 2000), draw(NUM_ROWS, 2000), draw(NUM_ROWS, 2000)
    mask, again, further = make(0.05, 1), grad.clone(), side.clone()
    kernels.drop_backward(grad, values, MaskedTensor(side, mask))
    elementwise.drop_backward(again, values, MaskedTensor(further, mask))
    assert_same(grad, again)
    assert torch.equal(side, further)


@pytest.mark.parametrize(
    ("family", "dropout"), [*((name, 0.0) for name in FAMILIES), *((name, 0.2) for name in DROPPING)]
)
def test_a_decoder_of_kernels_is_the_plain_one(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str, dropout: float
) -> None:
    batch = replace(draw_batch(monkeypatch), dropout_key=derive_key(1, 2, 3))
    found = []
    for ops in (kernels, elementwise):
        model = build(family, torch.float32, DEVICE, dropout=dropout)
        decoder = replace(recognize_decoder(model), ops=ops)
        loss = FusedEngine(decoder, torch.device(DEVICE), 4096, 1, LOGITS_BYTES, 4096).sum_losses(batch)
        loss.backward()
        found.append((float(loss.detach()), take_grads(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert measure_difference(found[0][1], found[1][1]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_kernels_draw_a_pieces_masks_as_the_wholes(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    batch = replace(draw_batch(monkeypatch), dropout_key=derive_key(1, 2, 3))
    found = []
    for ops, piece_tokens in ((kernels, 5), (elementwise, 0)):
        model = build(family, torch.float32, DEVICE, dropout=0.2)
        decoder = replace(recognize_decoder(model), ops=ops)
        engine = FusedEngine(decoder, torch.device(DEVICE), 4096, 2, LOGITS_BYTES, 4096, piece_tokens=piece_tokens)
        loss = engine.sum_losses(batch)
        loss.backward()
        found.append((float(loss.detach()), take_grads(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert measure_difference(found[0][1], found[1][1]) < 1e-4


def draw_batch(monkeypatch: pytest.MonkeyPatch) -> Batch:
    """Three examples and some padding; few tokens for the interpreter, but more than each window has."""
    if IS_INTERPRETED:
        monkeypatch.setattr(batches, "FLAT_MULTIPLE", 4)
    return form_flat_batch(draw_table((7, 1, 3) if IS_INTERPRETED else (17, 3, 9)), range(3))


def load_mixer_kernels() -> ModuleType:
    from tasks.decoder import mixer_kernels

    return mixer_kernels


@pytest.mark.parametrize(("num", "size", "half"), [(4, 64, 32), (3, 80, 8), (1, 256, 32), (5, 32, 0), (2, 512, 256)])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_head_kernels(num: int, size: int, half: int, has_norm: bool, adds: bool) -> None:
    mixer_kernels = load_mixer_kernels()
    # Every second head of a row: its neighbours are gates.
    states = draw(NUM_ROWS, 2 * num * size + 16)[:, : 2 * num * size].unflatten(-1, (-1, size))[:, ::2]
    cos, sin = draw(NUM_ROWS, half), draw(NUM_ROWS, half)
    weight = torch.rand(size, device=DEVICE) + 0.5 if has_norm else None
    result = mixer_kernels.turn_heads(states, weight, 1e-6, cos, sin)
    assert_same(result, mixer_elementwise.turn_heads(states, weight, 1e-6, cos, sin))
    grad = draw(NUM_ROWS, num, size)
    left, right = (room.unflatten(-1, (-1, size))[:, ::2] for room in rooms(NUM_ROWS, 2 * num * size))
    mixer_kernels.turn_heads_backward(grad, states, weight, 1e-6, cos, sin, left, adds=adds)
    mixer_elementwise.turn_heads_backward(grad, states, weight, 1e-6, cos, sin, right, adds=adds)
    assert_same(left, right)


@pytest.mark.parametrize("num_channels", [24, 200])
@pytest.mark.parametrize("width", [2, 4])
def test_convolution_kernels(num_channels: int, width: int) -> None:
    mixer_kernels = load_mixer_kernels()
    lengths = (1, 40, 2, 3, 37)
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in lengths])
    values = draw(len(positions), num_channels + 50)
    columns = torch.randperm(num_channels + 50)[:num_channels].to(DEVICE, torch.int32)
    weight = torch.randn(num_channels, width, device=DEVICE)
    result = mixer_kernels.convolve(values, columns, weight, positions)
    assert_same(result, mixer_elementwise.convolve(values, columns, weight, positions))
    grad = draw(len(positions), num_channels)
    left, right = rooms(len(positions), num_channels + 50)
    mixer_kernels.convolve_backward(grad, values, columns, weight, positions, left)
    mixer_elementwise.convolve_backward(grad, values, columns, weight, positions, right)
    assert_same(left, right)


@pytest.mark.parametrize("size", [24, 128])
def test_gated_norm_kernels(size: int) -> None:
    mixer_kernels = load_mixer_kernels()
    values, gates, grad = (draw(NUM_ROWS, 5, size) for _ in range(3))
    weight = torch.rand(size, device=DEVICE) + 0.5
    result = mixer_kernels.gate_norm(values, gates, weight, 1e-6)
    assert_same(result, mixer_elementwise.gate_norm(values, gates, weight, 1e-6))
    pairs = zip(
        mixer_kernels.gate_norm_backward(grad, values, gates, weight, 1e-6),
        mixer_elementwise.gate_norm_backward(grad, values, gates, weight, 1e-6),
        strict=True,
    )
    for found, wanted in pairs:
        assert_same(found, wanted)


def test_capped_cross_entropy_kernel(kernels: ModuleType) -> None:
    logits, targets = 20 * draw(NUM_ROWS, 10000), torch.randint(0, 10000, (NUM_ROWS,), device=DEVICE)
    again = logits.clone()
    assert_same(kernels.cross_entropy(logits, targets, 30.0), elementwise.cross_entropy(again, targets, 30.0))
    assert_same(logits, again)


@pytest.mark.parametrize("family", ["qwen3", "hunyuan_v1_dense", "olmo3"])
def test_a_decoder_of_kernels_trains_its_own_weights_as_the_plain_one(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    batch = draw_batch(monkeypatch)
    found = []
    for ops in (kernels, elementwise):
        model = build_own(family).to(DEVICE)
        decoder = replace(recognize_decoder(model, torch.float32), ops=ops)
        engine = FusedEngine(decoder, torch.device(DEVICE), 4096, 1, LOGITS_BYTES, 4096)
        assert engine.bind_gradients() is not None
        loss = engine.replay_gradient(batch, 0.25)
        assert loss is not None
        found.append((float(loss), take_own_grads(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    whole, each = compare_own(found[0][1], found[1][1])
    assert whole < 1e-4
    assert max(each.values()) < 1e-3


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU compiles them whole")
def test_every_program_is_one_that_the_compiler_takes() -> None:
    """The interpreter runs what the compiler refuses, so the compiler's first step sees every program as well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.tasks.decoder.lowering"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
