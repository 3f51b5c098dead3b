"""All-linear means what it says in every family: all experts, no router, no head, no tower; every weight is counted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from schemas.config import TrainingConfig
from tasks.families.adaptation import describe, plan_adaptation, summarize
from tasks.models import load_model
from tasks.training.lora import attach_adapter, collect_trained, name_adapted, save_adapter
from tasks.training.records import TrainingError
from tests.tasks.families.tiny import build_model, save_model

CONFIG = TrainingConfig(rank=4, alpha=8)


def count(case: str, *names: str) -> dict[str, tuple[int, int]]:
    rows = summarize(plan_adaptation(build_model(case), names or ("all-linear",)))
    return {row.kind: (row.num_adapted, row.num_weights) for row in rows}


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        # Layer 0 is dense (3 matrices), layer 1 has experts in two parameters, 3 matrices of shared ones, and a router.
        (
            "deepseek_v3",
            {
                "attention": (10, 10),
                "dense layers": (3, 3),
                "routed experts": (2, 2),
                "shared experts": (3, 3),
                "routers": (0, 1),
                "output head": (0, 1),
                "embeddings": (0, 1),
            },
        ),
        (
            "qwen3_5_moe",
            {
                "attention": (4, 4),
                "recurrent layers": (5, 5),
                "convolutions": (0, 1),
                "routed experts": (4, 4),
                "shared experts": (6, 6),
                "routers": (0, 4),
                "output head": (0, 1),
                "embeddings": (0, 1),
                "other parts": (0, 8),
            },
        ),
        (
            "gpt_oss",
            {
                "attention": (8, 8),
                "routed experts": (4, 4),
                "routers": (0, 2),
                "output head": (0, 1),
                "embeddings": (0, 1),
            },
        ),
        ("qwen3", {"attention": (8, 8), "dense layers": (6, 6), "embeddings": (0, 1), "output head": (0, 1)}),
    ],
)
def test_all_linear_by_kind(case: str, counts: dict[str, tuple[int, int]]) -> None:
    assert count(case) == counts


def test_the_share_is_said_in_a_line() -> None:
    rows = summarize(plan_adaptation(build_model("mixtral"), ("all-linear",)))
    # 2 layers x (attention 3,072 + experts 4 x 4,608) = 43,008 of 43,264 with the routers' 2 x 4 x 32.
    assert describe(rows).startswith("The adapter stands beside 99.4% of the text decoder's 43,264 linear weights")
    assert [row.skipped for row in rows if row.kind == "routers"] == [
        (
            "routers: 2 weights such as model.layers.0.mlp.gate.weight (stay as they are unless "
            "training.target_modules names them)",
        )
    ]


@pytest.mark.parametrize("case", ["deepseek_v3", "qwen3_5_moe", "qwen3_moe", "granitemoe", "hunyuan_v1_moe"])
def test_plain_peft_loads_what_was_saved(case: str, tmp_path: Path) -> None:
    save_model(case, tmp_path / "base")
    model = attach_adapter(load_model(tmp_path / "base"), CONFIG, seed=0).eval()
    with torch.no_grad():
        for name, matrix in collect_trained(model).items():
            if ".lora_B." in name:
                matrix.normal_(0, 0.1)
    save_adapter(model, tmp_path / "adapter")
    loaded: Any = PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "adapter")).eval()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            alone = loaded(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5 < (alone - expected).abs().max()
    assert name_adapted(loaded) == name_adapted(model)


def test_experts_go_by_the_names_of_their_projections() -> None:
    names = ("q_proj", "gate_proj", "up_proj", "down_proj")
    assert count("qwen3_moe", *names)["routed experts"] == (4, 4)
    assert count("mixtral", "w1", "w2", "w3")["routed experts"] == (4, 4)
    assert count("qwen3_moe", "q_proj")["routed experts"] == (0, 4)
    assert count("qwen3_moe", "experts")["routed experts"] == (4, 4)
    both = count("deepseek_v3", "gate_proj", "up_proj")
    assert (both["routed experts"], both["dense layers"], both["shared experts"]) == ((1, 2), (2, 3), (2, 3))


def test_half_a_projection_is_refused_with_what_would_do() -> None:
    model: Any = build_model("qwen3_moe")
    with pytest.raises(TrainingError, match=r"'gate_proj'.*one weight here: name both\): choose from .*gate_up_proj"):
        attach_adapter(model, TrainingConfig(target_modules=("gate_proj",)), seed=0)


@pytest.mark.parametrize(("case", "name"), [("qwen3_moe", "gate"), ("llama4", "router")])
def test_a_router_is_adapted_where_it_is_named(case: str, name: str) -> None:
    adapted, everything = count(case, "q_proj", name)["routers"]
    assert adapted == everything > 0
    model = attach_adapter(build_model(case), TrainingConfig(rank=4, target_modules=("q_proj", name)), seed=0).train()
    with torch.no_grad():
        for parameter in collect_trained(model).values():
            parameter.normal_(0, 0.1)
    model(input_ids=torch.arange(5, 30)[None]).logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in collect_trained(model).values())


@pytest.mark.parametrize("setting", [{"dropout": 0.1}, {"use_dora": True}])
def test_dropout_and_dora_are_refused_beside_experts_and_the_way_out_works(setting: dict[str, Any]) -> None:
    model: Any = build_model("qwen3_moe")
    with pytest.raises(
        TrainingError, match=r"does not go with .*experts.*training.target_modules of .*q_proj"
    ) as error:
        attach_adapter(model, TrainingConfig(**setting), seed=0)
    names = tuple(str(error.value).rpartition(" of ")[2].split(", "))
    attach_adapter(model, TrainingConfig(**setting, target_modules=names), seed=0)


def test_a_tower_of_the_same_names_is_left_alone() -> None:
    model = attach_adapter(build_model("gemma4"), TrainingConfig(target_modules=("q_proj", "v_proj")), seed=0)
    assert {name.partition(".layers")[0] for name in name_adapted(model)} == {"model.language_model"}
