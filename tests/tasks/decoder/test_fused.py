"""The fused decoder against the model's own forward pass, for each family, in small sizes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.config import TrainingConfig
from tasks.decoder.attention import Segments, attend_one_by_one
from tasks.decoder.decoder import LOGITS_BYTES
from tasks.decoder.float8 import quantize_decoder
from tasks.decoder.recognition import UnknownDecoderError, recognize_decoder
from tasks.tokenization.labels import Example
from tasks.training.batches import Batch, form_flat_batch, form_flat_step
from tasks.training.engines.fused import FusedEngine
from tasks.training.lora import attach_adapter, collect_trained
from tasks.training.reference import sum_losses
from tasks.training.token_table import TokenTable
from tests.tasks.tokenization.oracle import trained_runs

FAMILIES = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
    *(
        "ministral",
        "ministral3",
        "seed_oss",
        "granite",
        "smollm3",
        "gemma",
        "phi3",
        "glm",
        "glm4",
        "ernie4_5",
        "helium",
    ),
    *("hunyuan_v1_dense", "olmo2", "olmo3", "exaone4", "gemma4_text", "qwen3_5_text", "olmo_hybrid", "youtu"),
    *("qwen3_moe", "mixtral", "olmoe", "glm4_moe", "dots1", "ernie4_5_moe", "qwen2_moe", "qwen3_5_moe_text"),
    *("qwen3_next", "gpt_oss", "deepseek_v3", "glm4_moe_lite", "gemma4_moe"),
]
# Gemma 4's scores have no scale: what is rounded off in 16 bits grows.
LIMITS = {"gemma4_text": 0.2, "gemma4_moe": 0.5}
# Without SDPA in transformers.
EAGER = ("gpt_oss",)
LENGTHS = (17, 1, 3, 40, 9)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENTS = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# Of them, those whose tokens go through a few experts each.
EXPERTS = FAMILIES[FAMILIES.index("qwen3_moe") :]
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


def _partial(share: float) -> dict[str, Any]:
    """Rotation of the first columns of a head only."""
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}


_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "pad_token_id": 0,
}
_GROUPS: dict[str, Any] = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
FURTHER: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 24,
    },
    "ministral": {
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "ministral3": {
        "sliding_window": None,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 8,
        },
    },
    "seed_oss": {"head_dim": 32, "attention_bias": True, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.6,
        "residual_multiplier": 1.7,
        "attention_multiplier": 0.2,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    "gemma": {"head_dim": 32, "pad_token_id": 0},
    "phi3": {"sliding_window": 6, "pad_token_id": 0, "rope_parameters": _partial(0.75)},
    "glm": {"head_dim": 16, "pad_token_id": 0, "rope_parameters": _partial(0.5), "attention_bias": True},
    "glm4": {"head_dim": 32, "pad_token_id": 0, "rope_parameters": _partial(0.5)},
    "ernie4_5": {"head_dim": 16, "use_bias": True},
    "helium": {"head_dim": 16, "pad_token_id": 0},
    "hunyuan_v1_dense": {"head_dim": 16, "pad_token_id": 0, "attention_bias": True},
    "olmo2": {"pad_token_id": 0},
    "olmo3": {
        "pad_token_id": 0,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128,
        "final_logit_softcapping": 3.0,
        "pad_token_id": 0,
    },
    "gemma4_moe": {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 5,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "pad_token_id": 0,
    },
    "qwen3_5_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "pad_token_id": 0,
    },
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 7},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "pad_token_id": 0},
    "glm4_moe": {
        "head_dim": 32,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.7,
        "use_qk_norm": True,
        "rope_parameters": _partial(0.5),
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        **_LATENT,
        **_GROUPS,
        "q_lora_rank": 32,
        "first_k_dense_replace": 1,
        "rope_interleave": True,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32,
        },
    },
    "glm4_moe_lite": {
        **_LATENT,
        **_GROUPS,
        "q_lora_rank": None,
        "v_head_dim": 24,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_interleave": False,
    },
    "youtu": {**_LATENT, "q_lora_rank": 32},
    "dots1": {
        "head_dim": 16,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention"] * 3,
        "pad_token_id": 0,
    },
    "ernie4_5_moe": {
        "head_dim": 16,
        "moe_num_experts": 6,
        "moe_k": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "pad_token_id": 0,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_5_moe_text": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "pad_token_id": 0,
    },
    "qwen3_next": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "pad_token_id": 0,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
        "swiglu_limit": 0.4,
        "pad_token_id": 0,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "linear_allow_neg_eigval": True,
        "pad_token_id": 0,
    },
    "exaone4": {
        "head_dim": 32,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def name_attention_modules(family: str) -> tuple[str, ...]:
    """Names of the linear layers of its attention."""
    shape = FURTHER.get(family, {})
    if "kv_lora_rank" not in shape:
        return ATTENTION
    return ("q_a_proj", "q_b_proj", *LATENTS) if shape["q_lora_rank"] else ("q_proj", *LATENTS)


def make_model(family: str, **further: Any) -> Any:
    """A small model in fp32 with weights of every kind off their start."""
    torch.manual_seed(0)
    shape = {"model_type": family, **SHAPE, **FURTHER.get(family, {}), **further}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    attention = "eager" if family in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager", dtype=torch.float32
    )
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 0.05 * noise if parameter.dim() > 1 else parameter.data + 0.2 * noise
    return model


def build(family: str, dtype: torch.dtype, device: str = "cpu", **settings: Any) -> PeftModel:
    """A small model with weights of every kind off their start, and an adapter off its own."""
    model = make_model(family)
    if settings.get("dropout") and family in EXPERTS:
        settings = {
            "target_modules": name_attention_modules(family),
            **settings,
        }  # PEFT has no dropout for parameters of experts
    adapted = attach_adapter(model.to(dtype), TrainingConfig(**{"rank": 8, "alpha": 16, **settings}), seed=1)
    for parameter in collect_trained(adapted).values():
        parameter.data = (0.05 * torch.randn_like(parameter)).to(torch.float64 if dtype == torch.float64 else None)
    return adapted.to(device).train()


def draw_table(lengths: Sequence[int] = LENGTHS, *, untrained: Sequence[int] = ()) -> TokenTable:
    """Examples of the given lengths; the second half of each is trained, and nothing of the untrained ones."""
    generator = np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths])
    input_ids = generator.integers(0, 128, offsets[-1]).astype(np.int32)
    targets = np.full(offsets[-1], -100, np.int32)
    for number, length in enumerate(lengths):
        if number not in untrained:
            span = slice(offsets[number] + length // 2, offsets[number + 1] - 1)
            targets[span] = input_ids[span.start + 1 : span.stop + 1]
    return TokenTable([f"example {number}" for number in range(len(lengths))], offsets, input_ids, targets)


def list_examples(table: TokenTable) -> list[Example]:
    """The table's examples one by one, labels and all."""
    examples = []
    for begin, end in zip(table.offsets, table.offsets[1:], strict=False):
        labels = [-100, *table.targets[begin : end - 1].tolist()]
        examples.append(Example(table.input_ids[begin:end].tobytes(), tuple(trained_runs(labels))))
    return examples


def take_grads(model: PeftModel) -> Tensor:
    """The adapter's gradient as one vector, fp64; it is gone from the model."""
    parameters = collect_trained(model).values()
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return grads


def compute_reference(model: PeftModel, table: TokenTable) -> tuple[float, Tensor]:
    total = torch.zeros((), device=next(model.parameters()).device)
    dtype = next(iter(model.get_base_model().parameters())).dtype
    with torch.autocast(total.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for example in list_examples(table):
            if len(example.input_ids) > 1:
                total = total + sum_losses(model, example)
    total.backward()
    return float(total.detach()), take_grads(model)


def compute_fused(model: PeftModel, batch: Batch, *, recomputed: int = 0, fp8: bool = False) -> tuple[float, Tensor]:
    decoder = recognize_decoder(model)
    if fp8:
        decoder = quantize_decoder(decoder)
    device = next(model.parameters()).device
    engine = FusedEngine(decoder, device, 4096, recomputed, LOGITS_BYTES, 4096)
    loss = engine.sum_losses(batch)
    loss.backward()
    return float(loss.detach()), take_grads(model)


def measure_difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputed", [0, 2, 3])
def test_loss_and_gradient_are_the_references(family: str, recomputed: int) -> None:
    table = draw_table()
    model = build(family, torch.float32)
    loss, grads = compute_reference(model, table)
    fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, [3, 0, 4, 1, 2]), recomputed=recomputed)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert measure_difference(fused_grads, grads) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_in_16_bits_it_is_as_near_to_64_bits_as_the_model_itself(family: str) -> None:
    table = draw_table()
    _, exact = compute_reference(build(family, torch.float64), table)
    model = build(family, torch.bfloat16)
    _, general = compute_reference(model, table)
    _, fused = compute_fused(model, form_flat_batch(table, range(5)))
    if family in EXPERTS:  # a token at the border between two experts may go to the other one, in either way
        limit = LIMITS.get(family, 0.1)
        assert max(measure_difference(fused, exact), measure_difference(general, exact)) < limit
        return
    assert measure_difference(fused, exact) < 1.25 * measure_difference(general, exact) < LIMITS.get(family, 0.1)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("has_frozen", [True, False])
def test_frozen_experts_and_ranks_that_are_no_multiple_of_eight(family: str, has_frozen: bool) -> None:
    table = draw_table()
    settings: dict[str, Any] = {"use_rslora": True, "rank": 3}
    if has_frozen:
        settings = {"target_modules": name_attention_modules(family)}
    model = build(family, torch.float32, **settings)
    loss, grads = compute_reference(model, table)
    for recomputed in (0, 3):
        fused_loss, found = compute_fused(model, form_flat_batch(table, range(5)), recomputed=recomputed)
        assert fused_loss == pytest.approx(loss, rel=1e-6)
        assert measure_difference(found, grads) < 1e-5


def test_weights_of_experts_lie_once_and_answer_as_before() -> None:
    model = build("qwen3_moe", torch.float32)
    input_ids = torch.arange(12)[None]
    before = model(input_ids=input_ids).logits
    decoder = recognize_decoder(model)
    torch.testing.assert_close(model(input_ids=input_ids).logits, before, rtol=1e-5, atol=1e-6)
    experts = next(layer.experts for layer in decoder.layers if layer.experts is not None)
    for group in experts.adapters:
        assert group.part.weight.untyped_storage().data_ptr() == group.matrices.untyped_storage().data_ptr()


def test_gradients_of_experts_are_added_in_place() -> None:
    table, model = draw_table(), build("qwen3_moe", torch.float32)
    _, grads = compute_reference(model, table)
    engine = FusedEngine(recognize_decoder(model), torch.device("cpu"), 4096, 0, LOGITS_BYTES, 4096)
    flat = engine.bind_gradients()
    assert flat is not None
    for indices in ([0, 3], [1, 2, 4]):
        engine.sum_losses(form_flat_batch(table, indices)).backward()
    parameters = collect_trained(model).values()
    assert flat.numel() == sum(parameter.numel() for parameter in parameters)
    found = torch.cat([parameter.grad.flatten().double() for parameter in parameters if parameter.grad is not None])
    assert measure_difference(found, grads) < 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: block.register_module("extra", torch.nn.Identity()), "other modules than is known: extra"),
        (lambda block: setattr(block, "jitter_noise", 0.1), "adds noise to what the router sees"),
        (lambda block: setattr(find_experts(block), "is_transposed", True), "has is_transposed True"),
        (lambda block: block.gate.weight.requires_grad_(True), "is trained"),
        (lambda block: delattr(block.gate, "top_k"), "not made as is known .*top_k"),
    ],
)
def test_experts_that_are_made_otherwise_are_refused(change: Callable[[Any], Any], reason: str) -> None:
    model = build("qwen3_moe", torch.float32)
    base: Any = model.get_base_model()
    change(base.model.layers[0].mlp)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with pytest.raises(UnknownDecoderError, match=reason):
        recognize_decoder(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


def test_clamped_experts_of_another_layout_are_refused() -> None:
    model = build("gpt_oss", torch.float32)
    base: Any = model.get_base_model()
    experts = find_experts(base.model.layers[2].mlp)
    experts.is_transposed = False
    with pytest.raises(UnknownDecoderError, match="GptOssExperts has is_transposed False"):
        recognize_decoder(model)
    experts.is_transposed = True
    del experts.limit
    with pytest.raises(UnknownDecoderError, match=r"not made as is known .*limit"):
        recognize_decoder(model)


def find_experts(block: Any) -> Any:
    experts = block.experts
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return experts


def test_some_layers_adapted_and_rank_stabilized() -> None:
    table = draw_table()
    for settings in ({"target_modules": ("q_proj", "down_proj")}, {"use_rslora": True}):
        model = build("qwen2", torch.float32, **settings)
        loss, grads = compute_reference(model, table)
        fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, range(5)))
        assert fused_loss == pytest.approx(loss, rel=1e-6)
        assert measure_difference(fused_grads, grads) < 1e-5


@pytest.mark.parametrize(
    ("lengths", "indices", "untrained"),
    [
        ((5,), [0], ()),  # the padding is the longest segment
        ((64,), [0], ()),  # no padding at all
        ((5, 9), [0, 1], (0,)),  # an example without trained tokens beside one that has some
    ],
)
def test_odd_packs(lengths: tuple[int, ...], indices: list[int], untrained: tuple[int, ...]) -> None:
    table = draw_table(lengths, untrained=untrained)
    model = build("qwen3", torch.float32)
    loss, grads = compute_reference(model, table)
    fused_loss, fused_grads = compute_fused(model, form_flat_batch(table, indices))
    assert math.isfinite(fused_loss)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert measure_difference(fused_grads, grads) < 1e-5


def test_pack_without_trained_tokens_has_no_loss_and_no_gradient() -> None:
    table = draw_table((5, 9), untrained=(0, 1))
    loss, grads = compute_fused(build("llama", torch.float32), form_flat_batch(table, [0, 1]))
    assert loss == 0.0
    assert not grads.any()


def test_adapter_that_moved_is_seen() -> None:
    table, model = draw_table(), build("qwen3", torch.float32)
    engine = FusedEngine(recognize_decoder(model), torch.device("cpu"), 4096, 0, LOGITS_BYTES, 4096)
    parameters = list(collect_trained(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True)
    engine.attach_to(optimizer)
    batch = form_flat_batch(table, range(5))
    first = engine.sum_losses(batch)
    first.backward()
    optimizer.step()
    second = float(engine.sum_losses(batch).detach())
    take_grads(model)
    loss, _ = compute_reference(model, table)
    assert second == pytest.approx(loss, rel=1e-6)
    assert second != pytest.approx(float(first.detach()), rel=1e-3)


def test_model_still_answers_after_its_weights_moved() -> None:
    model = build("qwen2", torch.float32)
    input_ids = torch.arange(12)[None]
    before = model(input_ids=input_ids).logits
    recognize_decoder(model)
    assert torch.equal(model(input_ids=input_ids).logits, before)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "DoRA is on: .*lora_magnitude_vector"),
        ({"modules_to_save": ("embed_tokens",)}, "modules_to_save is set: .*embed_tokens.*is trained"),
        ({"target_modules": ("lm_head", "q_proj")}, "lm_head.*is trained"),
    ],
)
def test_what_it_does_not_do_it_refuses(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnknownDecoderError, match=reason):
        recognize_decoder(build("qwen2", torch.float32, **settings))


@pytest.mark.parametrize(
    ("family", "named"), [("gpt_neox", "none are found"), ("starcoder2", "Starcoder2DecoderLayer")]
)
def test_other_families_are_refused(family: str, named: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **shape))
    with pytest.raises(UnknownDecoderError, match=rf"layers that are not known \({named}\)"):
        recognize_decoder(attach_adapter(model, TrainingConfig(), seed=0))


def test_flat_steps_hold_every_example_once_and_are_even() -> None:
    lengths = [1 + (37 * number) % 50 for number in range(60)]
    table = draw_table(lengths)
    rows = [[number, number + 1] for number in range(0, 60, 2)]
    batches = form_flat_step(table, rows, 256, num_parts=4)
    names = [name for batch in batches for name in batch.example_ids]
    assert sorted(names) == sorted(table.example_ids)
    assert len(batches) % 4 == 0
    sizes = [batch.num_tokens for batch in batches]
    assert max(sizes) <= 256
    assert max(sizes) - min(sizes) <= 50
    assert sum(batch.num_trained_tokens for batch in batches) == int((table.targets >= 0).sum())


def test_example_above_the_budget_goes_alone() -> None:
    batches = form_flat_step(draw_table((300, 10, 10)), [[0], [1], [2]], 64)
    assert sorted(batch.num_tokens for batch in batches) == [20, 300]


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 10, 2, 8)
    together = attend_one_by_one(queries, keys, values, _lay((4, 6)), scale=0.3, window=None)
    alone = attend_one_by_one(queries[4:], keys[4:], values[4:], _lay((6,)), scale=0.3, window=None)
    torch.testing.assert_close(together[4:], alone)


def _lay(lengths: tuple[int, ...]) -> Segments:
    return Segments(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), lengths)
