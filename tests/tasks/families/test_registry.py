"""What is particular about a family is one row of a table."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, Phi4MultimodalConfig, Qwen3Config, Qwen3ForCausalLM

from tasks.families import registry
from tasks.families.adaptation import OUTSIDE, plan_adaptation, summarize
from tasks.families.classes import FamilyError
from tasks.families.registry import Family
from tests.tasks.families.tiny import build_config


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


def test_an_encoder_is_refused_unless_its_config_makes_a_decoder_of_it() -> None:
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    models = [
        AutoModelForCausalLM.from_config(BertConfig(**sizes, num_attention_heads=2, is_decoder=is_decoder))
        for is_decoder in (False, True)
    ]
    with pytest.raises(FamilyError, match="bert: it is an encoder, in which each token sees those after it"):
        plan_adaptation(models[0], ("all-linear",))
    assert len(plan_adaptation(models[1], ("all-linear",)).modules) == 7  # and the head's own layer


def test_attention_to_later_tokens_is_refused_where_the_config_says_so() -> None:
    config = build_config("gemma3_text")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert plan_adaptation(model, ("all-linear",)).modules
    config.use_bidirectional_attention = True
    with pytest.raises(FamilyError, match="gemma3_text: its config has each token see those after it"):
        plan_adaptation(model, ("all-linear",))


def test_image_and_audio_parts_inside_a_text_decoder_have_no_adapter() -> None:
    config = Phi4MultimodalConfig(num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rows = {row.kind: row for row in summarize(plan_adaptation(model, ("all-linear",)))}
    assert rows[OUTSIDE].num_adapted == 0
    assert sum(row.num_adapted for row in rows.values()) == 4
