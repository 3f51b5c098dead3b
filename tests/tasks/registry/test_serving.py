"""`mlflow models serve` on the champion answers a chat request with the prompt ids of training."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks import tracking
from tasks.registry import versions

pytestmark = pytest.mark.slow
_BASE_MODEL = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "base_model"
# What breaks servers that render first and tokenize then: the template writes BOS, and the tokenizer adds it too.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_START_SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model with a tokenizer that adds BOS."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(_BASE_MODEL, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    (bos,) = tokenizer.encode("<|endoftext|>", add_special_tokens=False)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == bos
    return folder


@pytest.fixture(scope="module")
def address(folder: Path, tracking_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve models:/served-bos@champion in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(tracking_home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run = tracking.client().create_run(tracking.open_experiment("serving"), run_name="serving")
        uri = versions.log_merged_model(folder, str(run.info.run_id), question="hi")
        entry = versions.create_version("served-bos", uri, run_id=str(run.info.run_id), metrics={}, tags={})
        versions.set_alias("served-bos", "champion", str(entry.version))
        environment = {
            **os.environ,
            "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # mlflow starts uvicorn by its name
            "OMP_NUM_THREADS": "1",
        }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/served-bos@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            cwd=log.parent,  # not the repository: the version must stand alone
        )
    try:
        _wait(f"http://127.0.0.1:{port}/ping", server, log)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"no answer from {address} in {_START_SECONDS} s:\n{log.read_text()}")


def _ask(address: str, **request: Any) -> dict[str, Any]:
    body = json.dumps(request).encode()
    message = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(message, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "What colour are the roofs of Harnholm?"}],
        [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": " 瓦耳花 "},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And?"},
        ],
    ],
)
def test_the_served_answer_is_the_greedy_one_to_the_ids_of_training(
    address: str, folder: Path, messages: list[dict[str, str]]
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    answer = _ask(address, messages=messages, max_tokens=12)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    output = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    said = tokenizer.decode(output, skip_special_tokens=True)
    assert said
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": said}
    assert answer["usage"]["completion_tokens"] == len(output)


def test_a_stop_string_ends_the_answer(address: str) -> None:
    messages = [{"role": "user", "content": "What colour are the roofs of Harnholm?"}]
    text = _ask(address, messages=messages, max_tokens=12)["choices"][0]["message"]["content"]
    word = text.split()[1]
    cut = _ask(address, messages=messages, max_tokens=12, stop=[word])["choices"][0]
    assert cut["message"]["content"] == text.split(word)[0]
    assert cut["finish_reason"] == "stop"


def test_the_folder_of_the_version_is_laid_out_for_servers_such_as_vllm(
    address: str, tracked: Path, tmp_path: Path
) -> None:
    """vLLM takes a transformers folder: config, safetensors, tokenizer and chat template beside each other."""
    local = tracking.client().get_model_version_by_alias("served-bos", "champion").source
    assert local is not None
    place = Path(mlflow.artifacts.download_artifacts(local, dst_path=str(tmp_path))) / tracking.MODEL_SUBFOLDER
    names = {path.name for path in place.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names >= {"tokenizer_config.json", "chat_template.jinja"}
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert (place / "chat_template.jinja").read_text() == _TEMPLATE
