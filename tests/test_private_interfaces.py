"""What is used of libraries and is not promised by them: each behind one module, and each still as it is taken for.

Where one of these tests fails after an upgrade, the module that it names has to be looked at; nothing else uses it.
"""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch import nn

_ROOT = Path(__file__).parent.parent
# What is used, as a pattern, and the one module that may use it.
_USES = {
    r"_compile_jinja_template|_plain_template_data|_alias_reasoning_fields": "tasks/tokenization/rendering.py",
    r"root_render_func|environment\.concat\b": "tasks/tokenization/joins.py",
    r"__getstate__": "tasks/tokenization/fast/words.py",
    r"BADNESS_RE": "tasks/ingestion/rows/quality.py",
    r"cache_files": "tasks/ingestion/sources/hub.py",
    r"\bTaskRunContext\.model_construct": "tasks/caching.py",
    r"SystemMetricsMonitor": "tasks/tracking/runs.py",
    r"_hard_delete_\w+|ManagedSessionMaker|dbmodels": "tasks/tracking/removal.py",
    r"prefect\.server\.services|provide_database_interface": "flows/flow_run_records.py",
    r"PREFECT__\w+": "flows/service/processes.py",
    r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE|keep_alive_\w+": "tasks/training/process/elastic.py",
    r"RendezvousClosedError": "tasks/training/process/launch.py",
    r"averaged_gradients|__compatible_ops__|single_partition_of_fp32|_lazy_init_hp": "tasks/training/zero.py",
    r"\bfound_inf\b": "tasks/training/optimizers.py",
    r"_no_split_modules": "tasks/training/sharding.py",
    r"subclass_8bit|OptimState8bit|__tensor_flatten__": "tasks/training/adamw.py",
    r"_scaled_mm": "tasks/decoder/quantized.py",
    r"\._version\b|\b_foreach_\w+": "tasks/decoder/adapters.py",
    r"flash_attn\.cute": "tasks/decoder/attention.py",
    r"_flash_attention_(forward|backward)": "tasks/decoder/sinks.py",
    r"\b_apply_gate\b|_is_expert_parallel": "tasks/training/engines/expert_adapters.py",
    r"_apply_liger_kernel_to_instance|MODEL_TYPE_TO_APPLY_LIGER_FN": "tasks/training/engines/liger.py",
}
_GONE = r"SubprocessASGIServer|warn_dependency_requirement_mismatches|\"Finished in"


def find_uses(pattern: str) -> set[str]:
    files = (file for package in ("flows", "tasks", "schemas", "deploy") for file in (_ROOT / package).rglob("*.py"))
    return {str(file.relative_to(_ROOT)) for file in files if re.search(pattern, file.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("pattern", _USES)
def test_each_is_behind_one_module(pattern: str) -> None:
    assert find_uses(pattern) <= {_USES[pattern]}


def test_what_has_a_public_way_is_done_by_it() -> None:
    assert find_uses(_GONE) == set()


def test_transformers_templates() -> None:
    from transformers.utils import chat_template_utils as module

    compiled = module._compile_jinja_template("{{ messages[0].content }}{% if false %}x{% endif %}")
    assert compiled.render(messages=[{"content": "a"}]) == "a"
    assert module._plain_template_data([{"n": torch.tensor(1).numpy()[()]}]) == [{"n": 1}]
    aliased = module._alias_reasoning_fields([{"role": "assistant", "content": "a", "reasoning": "r"}])[0]
    assert (aliased["reasoning_content"], aliased["thinking"]) == ("r", "r")


def test_jinja_joins_what_a_template_writes_by_names_that_can_be_replaced() -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = ImmutableSandboxedEnvironment().from_string("{{ 'a' ~ b }}")
    names: Any = template.root_render_func.__globals__
    assert {"str_join", "markup_join", "str"} <= {*names, *names["__builtins__"]}
    names["str_join"] = names["markup_join"] = lambda parts: "joined:" + "".join(map(str, parts))
    assert template.render(b=1) == "joined:a1"
    assert inspect.signature(template.environment.concat).parameters


def test_parts_of_a_tokenizer_tell_what_they_are_as_json() -> None:
    from tokenizers import models, pre_tokenizers

    assert json.loads(pre_tokenizers.ByteLevel().__getstate__())["type"] == "ByteLevel"
    assert json.loads(models.BPE(vocab={"a": 0}, merges=[]).__getstate__())["vocab"] == {"a": 0}


def test_ftfy_finds_bad_texts_by_one_pattern() -> None:
    import ftfy.badness

    assert ftfy.badness.BADNESS_RE.search("Ã©tÃ©")
    assert ftfy.badness.BADNESS_RE.flags & re.VERBOSE


def test_prefect_asks_a_task_run_context_for_its_task_and_names_a_flow_run_in_the_environment() -> None:
    from prefect import task
    from prefect.cache_policies import CacheKeyFnPolicy
    from prefect.context import TaskRunContext

    @task
    def stage() -> None: ...

    policy = CacheKeyFnPolicy(cache_key_fn=lambda context, inputs: f"{context.task.task_key} {inputs['number']}")
    known: dict[str, Any] = {"task": stage}
    context = TaskRunContext.model_construct(**known)
    assert policy.compute_key(task_ctx=context, inputs={"number": 3}, flow_parameters={}) == f"{stage.task_key} 3"

    number = str(uuid4())
    script = "from prefect.runtime import flow_run; print(flow_run.id)"
    result = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PREFECT__FLOW_RUN_ID": number}, capture_output=True
    )
    assert result.stdout.decode().split() == [number]


def test_mlflow_measures_the_machine_for_a_run() -> None:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    parameters = inspect.signature(SystemMetricsMonitor).parameters
    assert next(iter(parameters)) == "run_id"
    assert "resume_logging" in parameters
    assert callable(SystemMetricsMonitor.start)
    assert callable(SystemMetricsMonitor.finish)


def test_deepspeed_keeps_gradients_and_weights_under_these_names() -> None:
    pytest.importorskip("deepspeed")
    optimizers = [importlib.import_module(f"deepspeed.runtime.zero.{name}") for name in ("stage_1_and_2", "stage3")]
    for module, names in zip(
        optimizers,
        (
            ("averaged_gradients", "single_partition_of_fp32_groups", "_lazy_init_hp_params_optimizer_state"),
            ("averaged_gradients", "fp32_partitioned_groups_flat"),
        ),
        strict=True,
    ):
        source = inspect.getsource(module)
        missing = [name for name in names if f"self.{name}" not in source and f"def {name}(" not in source]
        assert not missing, f"{module.__name__} has no {missing} any more: see tasks/training/zero.py"
    assert isinstance(importlib.import_module("deepspeed.ops").__compatible_ops__, dict)


def test_adamw_skips_a_step_whose_gradient_is_not_finite() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer: Any = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for found, moves in ((1.0, False), (0.0, True)):
        before = parameter.detach().clone()
        parameter.grad = torch.ones(3)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert bool((parameter != before).any()) == moves


def test_torchao_keeps_a_moment_as_codes_of_8_bits_with_scales() -> None:
    pytest.importorskip("torchao")
    from torchao.optim.subclass_8bit import OptimState8bit  # type: ignore[import-not-found,unused-ignore]

    from tasks.training.adamw import put_together, take_apart

    assert list(inspect.signature(OptimState8bit).parameters)[:5] == ["codes", "scale", "qmap", "signed", "dtype"]
    moment = OptimState8bit.zeros((64, 128), signed=True)
    moment.copy_(torch.linspace(-1, 1, 64 * 128).view(64, 128))
    parts = dict(take_apart("exp_avg", moment))
    assert {name: value.dtype for name, value in parts.items()} == {
        "exp_avg|codes": torch.uint8, "exp_avg|scale": torch.float32, "exp_avg|qmap": torch.float32
    }  # fmt: skip
    again = put_together(parts)["exp_avg"]
    assert torch.equal(again.dequantize(), moment.dequantize())
    assert float((again.dequantize() - torch.linspace(-1, 1, 64 * 128).view(64, 128)).abs().max()) < 0.02


def test_mlflow_removes_a_run_and_a_model_for_good(tmp_path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{tmp_path}/mlflow.db", tmp_path.as_uri())
    with store.ManagedSessionMaker(read_only=False) as session:
        assert session.get_bind() is store.engine
    store.engine.dispose()
    assert list(inspect.signature(SqlAlchemyStore._hard_delete_run).parameters) == ["self", "run_id"]
    assert list(inspect.signature(SqlAlchemyStore._hard_delete_logged_model).parameters) == ["self", "model_id"]


def test_prefect_vacuums_a_database_that_it_is_given() -> None:
    from prefect.server.services import db_vacuum

    for name in ("orphaned_logs", "orphaned_artifacts", "stale_artifact_collections", "old_events"):
        function = getattr(db_vacuum, f"vacuum_{name}")
        assert list(inspect.signature(function).parameters) == ["db"], name
        assert inspect.iscoroutinefunction(function), name


def test_pytorch_counts_changes_in_place_and_copies_lists() -> None:
    left, right = [torch.zeros(2), torch.zeros(2)], [torch.ones(2), torch.ones(2)]
    versions = [tensor._version for tensor in left]
    torch._foreach_copy_(left, torch._foreach_mul(right, [2.0, 3.0]))
    assert [tensor.tolist() for tensor in left] == [[2.0, 2.0], [3.0, 3.0]]
    assert all(tensor._version > version for tensor, version in zip(left, versions, strict=True))
    assert hasattr(torch, "_scaled_mm")


def test_peft_adapts_experts_as_it_is_read() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from tasks.training.engines.expert_adapters import read_factors

    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=16, intermediate_size=8, moe_intermediate_size=12, num_hidden_layers=1, num_experts=3,
        num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(r=2, lora_alpha=6, target_parameters=names)
    )
    base: Any = model.get_base_model()
    wrapper = base.model.layers[0].mlp.experts
    experts = wrapper.get_base_layer()
    assert (experts.has_gate, experts.has_bias, experts.is_transposed, experts.num_experts) == (True, False, False, 3)
    for each in (wrapper, wrapper.base_layer):
        nn.init.normal_(each.lora_B["default"].weight)
        down, up, scale = read_factors(each)
        assert scale == 3.0
        torch.testing.assert_close((down @ up * scale).transpose(1, 2), each.get_delta_weight("default"))


def test_peft_lays_its_matrices_beside_the_layer() -> None:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    model: Any = nn.Sequential(nn.Linear(4, 4))
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, target_modules=["0"], lora_dropout=0.25))
    (layer,) = (module for module in adapted.modules() if isinstance(module, LoraLayer))
    assert type(layer.base_layer) is nn.Linear
    assert layer.lora_A["default"].weight.shape == (2, 4)
    assert layer.lora_B["default"].weight.shape == (4, 2)
    assert layer.scaling["default"] == 3.0
    assert layer.lora_dropout["default"].p == 0.25
    assert not layer.merged
    assert layer.use_dora == {"default": False}


def test_transformers_names_the_layers_that_stay_whole_and_the_attention() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    assert set(model._no_split_modules or ()) == {"LlamaDecoderLayer"}
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_an_elastic_agent_opens_a_store_in_each_round_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, dynamic_rendezvous

    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    is_shared: Any = dynamic_rendezvous.DynamicRendezvousHandler.use_agent_store
    assert is_shared.fget(None) is False
    source = inspect.getsource(dynamic_rendezvous.create_handler)
    assert all(name in source for name in ("keep_alive_interval", "keep_alive_max_attempt"))
    assert issubclass(RendezvousClosedError, Exception)
