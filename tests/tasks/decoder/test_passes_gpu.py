"""On a GPU: passes that are replayed, gradients that are added in place, and matrices that are copied in one launch."""

from typing import Any

import numpy as np
import pytest
import torch

from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.passes import PassRecorder, can_record
from tasks.decoder.recognition import recognize_decoder
from tasks.training.batches import form_flat_batch
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import collect_trained
from tests.tasks.decoder.small_models import build, draw_table

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SIZES: dict[str, Any] = {"rank": 16}


def build_engine(**settings: Any) -> tuple[FusedEngine, dict[str, Any]]:
    model = build("qwen3", torch.bfloat16, "cuda", **SIZES, **settings)
    decoder = recognize_decoder(model)
    device = torch.device("cuda")
    return FusedEngine(decoder, device, 8192, 0, LOGITS_BYTES, 65536), collect_trained(model)


def take(parameters: dict[str, Any]) -> torch.Tensor:
    return torch.cat([parameter.grad.detach().float().flatten() for parameter in parameters.values()])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replayed_passes_add_the_gradients_of_the_pass_itself(dropout: float) -> None:
    engine, parameters = build_engine(dropout=dropout)
    assert can_record(engine.decoder, engine.device)
    generator = np.random.default_rng(0)
    batches = []
    for number in range(12):
        lengths = generator.integers(2, 120, int(generator.integers(3, 20))).tolist()
        batch = form_flat_batch(draw_table(lengths), range(len(lengths)))
        batches.append(batch if not dropout else batch.__class__(**{**batch.__dict__, "dropout_key": number}))
    expected, losses = [], []
    for batch in batches:
        total = engine.sum_losses(batch)
        (total * 0.125).backward()
        losses.append(float(total.detach()))
        del total
        expected.append(take(parameters))
        for parameter in parameters.values():
            parameter.grad = None
    flat = engine.decoder.bind_gradients()
    assert flat is not None
    recorder = PassRecorder(engine.decoder, engine.device, longest=120, logits_bytes=LOGITS_BYTES)
    engine = FusedEngine(engine.decoder, engine.device, 8192, 0, LOGITS_BYTES, 65536, recorder)
    for _ in range(4):  # recorded in the first rounds, replayed in the others
        for batch, loss, grads in zip(batches, losses, expected, strict=True):
            flat.zero_()
            found = engine.replay_gradient(batch, 0.125)
            assert found is not None
            assert float(found) == pytest.approx(loss, rel=2e-3)
            assert float((take(parameters) - grads).norm() / grads.norm()) < 0.02
    assert recorder._recorder._num_failures == 0
    assert 1 < len(recorder._recorder.graphs) < 12


def test_matrices_are_copied_in_one_launch_as_one_by_one() -> None:
    from tasks.decoder import kernels
    from tasks.decoder.adapters import Copy

    joint = torch.zeros(200, 300, device="cuda", dtype=torch.bfloat16)
    sources = [torch.randn(shape, device="cuda") for shape in ((64, 100), (3, 7), (120, 200))]
    targets = [joint[:64, :100], joint[70:73, 200:207], joint[80:, 100:]]
    kernels.copy_matrices([Copy(a, b, s) for a, b, s in zip(sources, targets, (1.0, 0.5, 0.3), strict=True)])
    for source, target, scale in zip(sources, targets, (1.0, 0.5, 0.3), strict=True):
        assert torch.equal(target, (source * scale).to(torch.bfloat16))
    expected = sum(
        int((source * scale).to(torch.bfloat16).count_nonzero())
        for source, scale in zip(sources, (1.0, 0.5, 0.3), strict=True)
    )
    assert int(joint.count_nonzero()) == expected
    # Another decoder's matrices lie where these have lain, and have another scale.
    kernels.copy_matrices([Copy(a, b, 2.0) for a, b in zip(sources, targets, strict=True)])
    assert all(torch.equal(b, (a * 2.0).to(torch.bfloat16)) for a, b in zip(sources, targets, strict=True))
