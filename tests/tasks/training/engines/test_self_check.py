"""What a trial finds: by how much each matrix's gradient is off."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.training.engines.fused import FusedEngine
from tasks.training.engines.loss import cut_trial
from tasks.training.engines.self_check import compare, measure_differences, try_model
from tasks.training.lora import collect_trained
from tests.tasks.decoder.small_models import build, draw_table

CPU = torch.device("cpu")


def test_each_matrix_has_its_own_difference() -> None:
    table, model = draw_table(), build("qwen3", torch.float32)
    expected = try_model(model, table, CPU, torch.float32)
    engine = FusedEngine(recognize_decoder(model), CPU, 4096, 0, LOGITS_BYTES, 4096)
    pieces = cut_trial(table, count=2)
    found = measure_differences(model, engine, pieces, expected)
    assert found.grads.keys() == collect_trained(model).keys()
    assert found.loss < 1e-5
    assert all(difference < 1e-4 * norm for difference, norm in found.grads.values())
    # Another scale of the last layer's output is felt most by the matrices around it.
    last: Any = engine.decoder.layers[-1]
    (part,) = last.down.adapters.parts
    last.down.adapters.parts = (replace(part, scale=1.1 * part.scale),)
    engine.decoder.invalidate()
    changed = measure_differences(model, engine, pieces, expected).grads
    name = next(name for name in changed if "layers.2.mlp.down_proj.lora_B" in name)
    assert changed[name][0] == pytest.approx(0.1 * changed[name][1], rel=0.2)
    assert changed[name][0] / changed[name][1] > 4 * found.grads[name][0] / found.grads[name][1]


def test_a_gradient_that_is_not_a_number_is_refused() -> None:
    table, model = draw_table(), build("qwen3", torch.float32)
    expected = try_model(model, table, CPU, torch.float32)
    engine = FusedEngine(recognize_decoder(model), CPU, 4096, 0, LOGITS_BYTES, 4096)
    for value in (float("nan"), 0.0, 1e200):
        grads = {name: torch.full_like(grad, value, dtype=torch.float64) for name, grad in expected.grads.items()}
        with pytest.raises(UnknownDecoderError, match="its gradient differs by"):
            compare(model, engine, cut_trial(table, count=2), expected._replace(grads=grads), torch.float32)
