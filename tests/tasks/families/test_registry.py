"""What is particular about a family is one row of a table."""

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from tasks.families import registry
from tasks.families.adaptation import plan_adaptation, summarize
from tasks.families.registry import Family


def test_a_family_is_one_row_of_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Qwen3Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)

    def count_adapted() -> int:
        return sum(row.num_adapted for row in summarize(plan_adaptation(model, ("all-linear",))))

    assert count_adapted() == 7
    row = Family(("qwen3",), skipped={"mlp": "its gate is read by a kernel of its own"})
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, row))
    assert count_adapted() == 4  # queries, keys, values and output
