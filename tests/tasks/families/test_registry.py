"""What is particular about a family is one row of a table."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma4UnifiedAssistantConfig,
    HrmTextConfig,
    Idefics3Config,
    IdeficsConfig,
    Kosmos2Config,
    Phi4MultimodalConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    ReformerConfig,
    XLMConfig,
)

from tasks.families import registry
from tasks.families.adaptation import HEAD, OUTSIDE, plan_adaptation, summarize
from tasks.families.classes import FamilyError, choose_class
from tasks.families.reading import check_reads_text
from tasks.families.registry import Family, explain_refused
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


@pytest.mark.parametrize(
    ("case", "kind", "number"),
    [("mllama", "dense layers", 6), ("trocr", "attention", 8), ("nemotron_h_omni", HEAD, 0), ("dbrx", "attention", 4)],
)
def test_what_no_token_reaches_and_what_no_adapter_can_stand_beside_is_left_alone(
    case: str, kind: str, number: int
) -> None:
    """Layers that read images or an encoder, and the head that a composite does not name."""
    config = build_config(case)
    with torch.device("meta"):
        model: Any = choose_class(config, case)._from_config(config)
    rows = {row.kind: row for row in summarize(plan_adaptation(model, ("all-linear",)))}
    assert rows[kind].num_adapted == number
    assert rows[kind].num_weights == number or rows[kind].skipped


@pytest.mark.parametrize("kind", [IdeficsConfig, Kosmos2Config])
def test_a_model_that_asks_for_images_is_refused_in_its_own_words(kind: Any) -> None:
    with pytest.raises(FamilyError, match=r"does not read text alone .*pixel_values"):
        check_reads_text(_build_without_values(kind()))
    check_reads_text(_build_without_values(Idefics3Config()))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (XLMConfig(), "encoder"),
        (XLMConfig(causal=True), ""),
        (ReformerConfig(is_decoder=True), "without a gradient"),
        (Gemma4UnifiedAssistantConfig(), "drafts for another model"),
        (HrmTextConfig(prefix_lm=True), "set prefix_lm to false in the config.json of a copy"),
        (HrmTextConfig(prefix_lm=False), ""),
    ],
)
def test_what_cannot_be_trained_is_told_by_its_config(config: Any, why: str) -> None:
    assert why in explain_refused(config)
    assert bool(explain_refused(config)) is bool(why)


def _build_without_values(config: Any) -> Any:
    with torch.device("meta"):
        return choose_class(config, config.model_type)._from_config(config)
