"""The output head whose vocabulary is no multiple of what the products want."""

import pytest
import torch
from torch import nn

from tasks.decoder.head import Head
from tasks.decoder.weights import TrainedWeights
from tasks.training.batches import form_flat_batch
from tests.tasks.decoder import small_models
from tests.tasks.decoder.small_models import build, compute_fused, compute_reference, draw_table, measure_difference


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("vocabulary", [101, 128])
def test_logits_and_their_gradient_are_those_of_the_module(vocabulary: int, has_bias: bool) -> None:
    module = nn.Linear(24, vocabulary, bias=has_bias, dtype=torch.bfloat16).requires_grad_(False)
    before = module.weight.clone()
    head = Head(module)
    rows, grad = (torch.randn(7, width, dtype=torch.bfloat16) for width in (24, vocabulary))
    logits = head.forward(rows)
    assert logits.shape == (7, vocabulary)
    assert torch.equal(logits, module(rows))
    assert logits.stride(0) % 64 == 0
    logits.copy_(grad)
    torch.testing.assert_close(head.backward(logits), grad @ before, rtol=0.02, atol=0.02)
    assert torch.equal(module.weight, before)
    assert module.weight.untyped_storage().data_ptr() == head.weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # a head of its own, and one that is the embeddings
def test_any_vocabulary_gives_the_gradient_of_the_model_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small_models.SHAPE, "vocab_size", 131)
    table = draw_table()
    _, exact = compute_reference(build(family, torch.float64), table)
    model = build(family, torch.bfloat16)
    _, general = compute_reference(model, table)
    _, fused = compute_fused(model, form_flat_batch(table, range(5)))
    assert measure_difference(fused, exact) < 1.25 * measure_difference(general, exact) < 0.1


def test_a_trained_heads_copy_follows_it() -> None:
    module = nn.Linear(24, 101, bias=False)
    weights = TrainedWeights(torch.bfloat16)
    head = Head(module, weights=weights)
    rows = torch.randn(7, 24, dtype=torch.bfloat16)
    for _ in range(2):
        assert torch.equal(head.forward(rows), rows @ module.weight.to(torch.bfloat16).t())
        module.weight.data += 1.0
        weights.invalidate()
        weights.refresh()
    total = head.add_grad(None, head.forward(rows), rows)
    assert total is not None
    assert total.shape == module.weight.shape
