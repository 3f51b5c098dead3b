"""The model's own weights are trained as the plain loop does it, and go on after a stop."""

import json
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from schemas.config import TrainingConfig
from tasks.models import load_model
from tasks.training import distributed
from tasks.training.adapter_costs import describe_costs
from tasks.training.engines.self_check import comparing_some
from tasks.training.loop import train_adapter
from tasks.training.lora import collect_trained
from tasks.training.micro_batches import iterate_steps
from tasks.training.own_weights import choose_weights, plan_weights
from tasks.training.process.launch import run_training
from tasks.training.process.messages import TrainingJob
from tasks.training.records import EvalRecord, StepRecord, TrainingError, TrainingStopped
from tasks.training.reference import average_loss, fine_tune, learning_rate
from tests.tasks.families.tiny import save_model
from tests.tasks.training.conftest import (
    KINDS,
    build_model,
    needs_deepspeed,
    read_tokens,
    write_tokens,
)
from tests.tasks.training.ranks import on_two_ranks
from tests.tasks.training.test_reference import read_examples

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3, "micro_batch": 3, "gradient_accumulation_steps": 2, "max_steps": 20, "num_epochs": 9,
    "weight_decay": 0.01, "max_grad_norm": 0.5, "checkpoint_every_steps": 4,
}  # fmt: skip
FULL = TrainingConfig(method="full", **SETTINGS)
FREEZE = TrainingConfig(method="freeze", trained_layers=1, **SETTINGS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("config", [FULL, FREEZE], ids=["full", "freeze"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_curve_is_that_of_the_plain_loop(tmp_path: Path, kind: str, config: TrainingConfig) -> None:
    base_model = build_model(tmp_path / "model", kind)
    tokens = write_tokens(tmp_path / "tokens", num_train=44)
    records: list[StepRecord] = []
    evaluations: list[EvalRecord] = []
    outcome = train_adapter(
        base_model, tokens, tmp_path / "run", config, seed=7, identity="x",
        on_step=records.append, on_eval=evaluations.append,
    )  # fmt: skip

    examples = read_examples(tokens)
    table, rows = read_tokens(tokens / "train.parquet")
    batches = iterate_steps(table, rows, config, seed=7, first=0, last=20)
    steps = [[examples[name] for batch in step for name in batch.example_ids] for step in batches]
    model: Any = load_model(base_model).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.method == "full" or ".layers.1." in name)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rates = [learning_rate(step, 20, config) for step in range(20)]
    losses = list(fine_tune(model, steps, rates, max_grad_norm=0.5, weight_decay=0.01))

    assert losses[-1] < losses[0] - 0.2  # it did learn
    assert max(abs(record.loss - loss) for record, loss in zip(records, losses, strict=True)) <= 1e-4
    held_out = list(read_examples(tokens, "eval").values())
    assert evaluations[-1].loss == pytest.approx(average_loss(model, held_out), abs=1e-4)
    saved = load_file(outcome.adapter / "trained_weights.safetensors")
    expected = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    assert saved.keys() == expected.keys()
    # A norm without an effect on the loss, such as one before a softmax that is invariant to it, moves by noise alone.
    moved = sum(float((expected[name] - before[name]).norm() ** 2) for name in saved) ** 0.5
    off = sum(float((saved[name] - expected[name]).norm() ** 2) for name in saved) ** 0.5
    assert off <= 0.01 * moved
    assert not outcome.warnings or all("did not move" not in warning for warning in outcome.warnings)


@pytest.mark.parametrize("config", [FULL, FREEZE], ids=["full", "freeze"])
def test_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, config: TrainingConfig) -> None:
    base_model, tokens = build_model(tmp_path / "model"), write_tokens(tmp_path / "tokens", num_train=44)
    losses: dict[str, list[float]] = {"whole": [], "stopped": []}

    def train(name: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        outcome = train_adapter(
            base_model, tokens, tmp_path / name, config, seed=5, identity="the same",
            on_step=lambda record: losses[name].append(record.loss),
            should_stop=lambda: len(losses[name]) == stop_at,
        )  # fmt: skip
        return load_file(outcome.adapter / "trained_weights.safetensors")

    whole = train("whole")
    with pytest.raises(TrainingStopped):
        train("stopped", stop_at=7)
    again = train("stopped")
    assert losses["stopped"] == losses["whole"]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.fixture
def eager() -> Iterator[None]:
    """Torchao compiles its step, which takes a minute; as it is written it computes the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.skipif(find_spec("torchao") is None, reason="the extra torchao is not installed")
@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_moments_in_8_bits_learn_alike_and_go_on_after_a_stop(tmp_path: Path, method: str) -> None:
    base_model = build_model(tmp_path / "model", hidden_size=128, intermediate_size=256)
    tokens = write_tokens(tmp_path / "tokens", num_train=44)
    losses: dict[str, list[float]] = {"exact": [], "whole": [], "stopped": []}

    def train(name: str, optimizer: str, stop_at: int | None = None) -> dict[str, torch.Tensor]:
        config = TrainingConfig.model_validate({**SETTINGS, "method": method, "optimizer": optimizer, "rank": 32})
        outcome = train_adapter(
            base_model, tokens, tmp_path / name, config, seed=5, identity="the same",
            on_step=lambda record: losses[name].append(record.loss),
            should_stop=lambda: len(losses[name]) == stop_at,
        )  # fmt: skip
        (file,) = outcome.adapter.glob("*.safetensors")
        return load_file(file)

    train("exact", "adamw")
    whole = train("whole", "adamw_8bit")
    assert losses["whole"] != losses["exact"]
    assert losses["whole"] == pytest.approx(losses["exact"], rel=0.02)
    with pytest.raises(TrainingStopped):
        train("stopped", "adamw_8bit", stop_at=7)
    state = load_file(max((tmp_path / "stopped" / "checkpoints").glob("step-*")) / "optimizer.safetensors")
    assert {name.rsplit("|", 1)[-1] for name in state} >= {"codes", "scale", "qmap", "step"}
    assert {tensor.dtype for name, tensor in state.items() if name.endswith("codes")} == {torch.uint8}
    again = train("stopped", "adamw_8bit")
    assert losses["stopped"] == losses["whole"]
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_without_torchao_no_training_starts(tmp_path: Path, base_model: Path, tokens: Path) -> None:
    if find_spec("torchao") is not None:
        pytest.skip("it is installed")
    config = TrainingConfig(optimizer="adamw_8bit")
    job = TrainingJob(base_model, tokens, tmp_path / "run", config, 5, "x")
    with pytest.raises(TrainingError, match=r"optimizer is adamw_8bit.*pip install 'sft-pipeline\[torchao\]'"):
        run_training(job)
    assert not (tmp_path / "run").exists()


Curves = tuple[list[float], list[float], list[float]]


def train_together(
    number: int, base_model: Path, tokens: Path, folder: Path, changes: dict[str, Any], stop_at: int
) -> Curves:
    """Train until a step, or the end; return losses, gradient norms and evaluation losses."""
    curves: Curves = ([], [], [])

    def note(record: StepRecord) -> None:
        curves[0].append(record.loss)
        curves[1].append(record.grad_norm)

    with suppress(TrainingStopped):
        train_adapter(
            base_model, tokens, folder, FULL.model_copy(update=changes), seed=5, identity="x",
            on_step=note, on_eval=lambda record: curves[2].append(record.loss),
            should_stop=lambda: len(curves[0]) == stop_at,
        )  # fmt: skip
    return curves


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("ddp", "full"),
        ("fsdp", "full"),
        ("fsdp", "freeze"),
        pytest.param("zero2", "full", marks=needs_deepspeed),
        pytest.param("zero3", "full", marks=needs_deepspeed),
    ],
)
def test_two_ranks_have_the_curve_of_one_and_go_on_from_it(
    tmp_path: Path, base_model: Path, tokens: Path, strategy: str, method: str
) -> None:
    changes = {"method": method, "trained_layers": 1}
    alone = train_together(0, base_model, tokens, tmp_path / "alone", changes, 100)
    assert min(alone[1]) > FULL.max_grad_norm  # every step is clipped
    divided = {**changes, "strategy": strategy}
    together = tmp_path / "together"
    first = train_together(0, base_model, tokens, together, changes, 5)
    assert first[0] == alone[0][:5]
    second, third = (
        on_two_ranks(
            train_together, base_model, tokens, together, divided, stop_at,
            folder=tmp_path / name, library="deepspeed" if strategy.startswith("zero") else None,
        )
        for name, stop_at in (("second", 7), ("third", 100))
    )  # fmt: skip
    for (losses, norms, evaluations), (rest, further, last) in zip(second, third, strict=True):
        assert [*losses, *rest] == pytest.approx(alone[0][5:], abs=2e-5)
        assert [*norms, *further] == pytest.approx(alone[1][5:], rel=1e-3)
        assert [*first[2], *evaluations, *last] == pytest.approx(alone[2], abs=2e-5)
    one, other = (
        load_file(tmp_path / name / "trained_weights" / "trained_weights.safetensors") for name in ("alone", "together")
    )
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4


def sum_in_buckets(number: int) -> list[list[float]]:
    """Sum gradients of which the second rank lacks one, in groups of a value or two, and two figures."""
    distributed._BUCKET = 2
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 1, 3)]
    for place, parameter in enumerate(parameters):
        if not (number == 1 and place == 1):
            parameter.grad = torch.full_like(parameter, 10.0 * place + number)
    figures = distributed.sum_gradients(parameters, torch.tensor(1.0 + number), torch.tensor(2.0))
    return [*(value.grad.tolist() for value in parameters if value.grad is not None), [f.item() for f in figures]]


def test_gradients_are_summed_group_by_group(tmp_path: Path) -> None:
    expected = [[1.0, 1.0], [10.0], [41.0], [61.0, 61.0, 61.0], [3.0, 4.0]]
    assert on_two_ranks(sum_in_buckets, folder=tmp_path / "ranks") == [expected, expected]


def test_named_modules_and_layers_are_trained_and_nothing_else(base_model: Path) -> None:
    def choose(**settings: Any) -> set[str]:
        config = TrainingConfig.model_validate({"method": "freeze", **settings})
        return set(collect_trained(choose_weights(load_model(base_model), config, dtype=torch.bfloat16)))

    every = {name for name, _ in load_model(base_model).named_parameters()}
    assert choose(trained_layers=2) == {name for name in every if ".layers." in name}
    assert choose(trained_layers=1, trained_modules=["norm"]) == {
        name for name in every if ".layers.1." in name or name == "model.norm.weight"
    }
    assert choose(trained_layers=0, trained_modules=["layers.0.mlp"]) == {
        name for name in every if ".layers.0.mlp." in name
    }
    # Tied to the embedding, of which it is a second name.
    assert choose(trained_layers=0, trained_modules=["lm_head"]) == {"model.embed_tokens.weight"}
    for settings, message in (
        ({"trained_layers": 3}, "trained_layers is 3, and this Qwen3ForCausalLM has 2 layers"),
        ({"trained_modules": ["wings"]}, "'wings', which is not in this Qwen3ForCausalLM: choose from .*down_proj"),
    ):
        with pytest.raises(TrainingError, match=message):
            choose(**settings)


def test_what_is_trained_is_fp32_and_the_rest_in_the_precision_of_the_training(base_model: Path) -> None:
    model = choose_weights(load_model(base_model, dtype=torch.bfloat16), FREEZE, dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if ".layers.1." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".layers.1." not in name} == {torch.bfloat16}


def test_bf16_products_learn_too(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    for config in (FULL, FREEZE):
        records: list[StepRecord] = []
        settings = config.model_copy(update={"precision": "bf16"})
        outcome = train_adapter(
            base_model, tokens, tmp_path / config.method, settings, seed=7, identity="x", on_step=records.append
        )
        assert sum(record.loss for record in records[-5:]) < sum(record.loss for record in records[:5]) - 0.5
        assert not [warning for warning in outcome.warnings if "padded" in warning]
        saved = load_file(outcome.adapter / "trained_weights.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float32}


def test_trial_compares_both_ends_of_a_large_model(base_model: Path) -> None:
    model = choose_weights(load_model(base_model), FULL, dtype=torch.float32)
    every = list(collect_trained(model))
    with comparing_some(model):
        assert list(collect_trained(model)) == every
    with comparing_some(model, most_values=4000):
        some = set(collect_trained(model))
        assert {every[0], every[-1]} <= some < set(every)
    assert list(collect_trained(model)) == every


def test_parts_of_a_composite_that_see_no_text_stay(tmp_path: Path) -> None:
    model = save_model("gemma3", tmp_path / "model")
    plan = plan_weights(load_model(model), FULL)
    skipped = {weight.name for weight in plan if weight.skipped}
    assert skipped
    assert all("vision" in name or "projector" in name for name in skipped)
    assert all("vision" not in weight.name for weight in plan if not weight.skipped)


def test_folder_says_what_it_is(base_model: Path, tokens: Path, tmp_path: Path) -> None:
    config = FREEZE.model_copy(update={"max_steps": 2})
    outcome = train_adapter(base_model, tokens, tmp_path / "run", config, seed=5, identity="x")
    assert outcome.adapter == tmp_path / "run" / "trained_weights"
    values = json.loads((outcome.adapter / "trained_config.json").read_text(encoding="utf-8"))
    count = sum(value.numel() for value in load_file(outcome.adapter / "trained_weights.safetensors").values())
    assert values == {"method": "freeze", "base_model_name_or_path": str(base_model), "num_values": count}
    assert outcome.num_trainable_parameters == count


def test_cost_counts_the_copies_of_16_bits() -> None:
    weights = {"weight": torch.nn.Parameter(torch.empty(1 << 20, 1 << 10, device="meta"))}  # 2^30 values
    for engine, dtype, gib in (
        ("fused engine", torch.bfloat16, 18),
        ("fused engine", torch.float32, 16),
        ("general engine", torch.bfloat16, 16),
    ):
        (sentence,) = describe_costs(FULL, weights, engine, dtype)
        assert f"{gib}.00 GiB with their gradient" in sentence
        assert "12.00 GiB on the disk" in sentence
