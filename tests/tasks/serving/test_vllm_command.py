"""vLLM's command is what the model needs, and what a command does otherwise is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tasks.serving.call_syntax import JsonCalls
from tasks.serving.vllm_command import VllmNeeds, check_command, count_gpus, read_needs, write_command
from tasks.storage import digest_folder


@pytest.fixture
def needs(tmp_path: Path) -> VllmNeeds:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    syntax = JsonCalls("<tool_call>", "name", "arguments")
    return VllmNeeds(tmp_path, "mine", 4096, 2048, "bfloat16", syntax, frozenset({3, 7}), "{{ x }}", 10**9)


def test_the_written_command_passes_its_own_check(needs: VllmNeeds) -> None:
    words = write_command(needs, length=4096, num_gpus=2)
    assert words[:5] == ["vllm", "serve", str(needs.folder), "--served-model-name", "mine"]
    assert words[-2:] == ["--tensor-parallel-size", "2"]
    assert check_command(words, needs) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--served-model-name": None}, "--served-model-name mine"),
        ({"--dtype": "float16"}, "stored in bfloat16"),
        ({"--max-model-len": "1k"}, "trained on examples of up to 2048"),
        ({"--max-model-len": "8192"}, "context is 4096"),
        ({"--tool-call-parser": "mistral"}, "--tool-call-parser hermes"),
        ({"--host": "0.0.0.0"}, "without a key"),
        ({"--host": None}, "without a key"),
        ({"--quantization": "fp8"}, "changes the weights"),
        ({"--chat-template": "{{ y }}"}, "not the template of training"),
        ({"--tokenizer": "/elsewhere"}, "own tokenizer"),
        ({"--trust-remote-code": ""}, "runs code"),
        ({"--kv-cache-dtype": "fp8"}, "what attention remembers"),
        ({"--override-generation-config": '{"eos_token_id": 1}'}, "stop ids away"),
    ],
)
def test_what_would_be_otherwise_is_said(needs: VllmNeeds, changed: dict[str, str | None], told: str) -> None:
    words = write_command(needs)
    for flag, value in changed.items():
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
        words += [flag, *([value] if value else [])] if value is not None else []
    (problem,) = check_command(words, needs)
    assert told in problem


def test_a_version_is_served_from_a_copy_of_it(
    needs: VllmNeeds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is one of the cache, which nobody could find, and which is cleared."""
    monkeypatch.chdir(tmp_path)
    version = replace(needs, version="mine/3", digest=digest_folder(tmp_path))
    words = write_command(version)
    assert words[:3] == ["vllm", "serve", "mine-3"]
    assert check_command(words, version) == []  # it will be copied
    shutil.copytree(needs.folder, tmp_path.with_name("elsewhere"))
    assert check_command(["vllm", "serve", "../elsewhere", *words[3:]], version) == []
    Path("mine-3").mkdir()
    (problem,) = check_command(words, version)
    assert problem == "it serves mine-3: the model is mine/3, which `sft merge mine/3 mine-3` copies"


def test_lost_stop_ids_and_another_model_are_said(needs: VllmNeeds, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert "does not name the stop ids [7]" in check_command(write_command(needs), needs)[0]
    words = ["vllm", "serve", "/other", *write_command(needs)[3:]]
    assert "it serves /other" in check_command(words, needs)[0]
    with pytest.raises(ValueError, match="is no `vllm serve"):
        check_command(["python", "-m", "http.server"], needs)


def test_no_example_is_longer_than_the_models_context(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    rest: dict[str, Any] = {"syntax": None, "stop_ids": frozenset({3}), "template": "{{ x }}"}
    needs = read_needs(tmp_path, "mine", **rest, trained_length=2048)  # the setting's default
    assert check_command(write_command(needs), needs) == []
    assert "examples of up to 512" in check_command(write_command(needs, length=256), needs)[0]


def test_float32_weights_are_not_halved_by_default(needs: VllmNeeds) -> None:
    single = VllmNeeds(**{**vars(needs), "dtype": "float32"})
    words = [word for word in write_command(single) if word not in ("--dtype", "float32")]
    assert any("--dtype float32 serves what was tested" in problem for problem in check_command(words, single))


def test_gpus_are_counted_by_the_weights(needs: VllmNeeds) -> None:
    assert [count_gpus(VllmNeeds(**{**vars(needs), "num_bytes": size}), 80 * 10**9) for size in (1, 4e10, 1.4e11)] == [
        1,
        2,
        4,
    ]
