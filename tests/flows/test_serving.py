"""`sft serve-model` keeps to this machine unless it is told otherwise, and answers by its own names only."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.serving import ServingError, ServingOptions, check_options, list_hosts
from tasks import tracking
from tasks.registry import versions
from tests.end_to_end.service import free_port

_BASE_MODEL = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "base_model"
_runner = CliRunner()


def test_beyond_loopback_a_key_and_a_name_are_wanted() -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        check_options(ServingOptions(host=host))
    with pytest.raises(ServingError, match="give a key"):
        check_options(ServingOptions(host="0.0.0.0"))
    with pytest.raises(ServingError, match="--allow-host"):
        check_options(ServingOptions(host="0.0.0.0", api_key="k"))
    check_options(ServingOptions(host="0.0.0.0", api_key="k", allowed_hosts=("llm.example",)))
    assert list_hosts(ServingOptions()) == ("127.0.0.1", "localhost", "[::1]")
    assert list_hosts(ServingOptions(host="10.0.0.5", allowed_hosts=("llm.example",))) == ("10.0.0.5", "llm.example")


def test_options_that_mean_nothing_are_refused() -> None:
    for arguments, told in (
        (["--engine", "tgi"], "transformers or vllm"),
        (["--precision", "int8"], "auto, bf16 or fp32"),
        (["--check", "x.sh"], "add --engine vllm"),
        (["--host", "0.0.0.0"], "give a key"),
    ):
        done = _runner.invoke(app, ["serve-model", str(_BASE_MODEL), *arguments])
        assert done.exit_code == 1
        assert told in " ".join(done.output.split())


def test_a_folder_without_a_chat_template_is_refused() -> None:
    done = _runner.invoke(app, ["serve-model", str(_BASE_MODEL)])
    assert done.exit_code == 1
    assert "has no chat template" in " ".join(done.output.split())


@pytest.mark.slow
def test_the_command_serves_on_loopback_by_its_own_names(tmp_path: Path) -> None:
    from tasks.tokenization.saving import save_tokenizer
    from tasks.tokenization.templates import prepare_tokenizer

    folder = tmp_path / "small"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).symlink_to(_BASE_MODEL / file)
    save_tokenizer(prepare_tokenizer(_BASE_MODEL, None), folder)
    port = free_port()
    log = tmp_path / "log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "serve-model", str(folder), "--port", str(port)],
            stderr=output,
            env={**os.environ, "SFT_HOME": str(tmp_path / "home"), "PYTHONUNBUFFERED": "1"},
        )
    try:
        end = time.monotonic() + 300
        while "Ctrl-C ends it" not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        assert re.search(rf"small at http://127.0.0.1:{port}/v1, up to 512 tokens", log.read_text())
        url = f"http://127.0.0.1:{port}"
        (model,) = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
        assert model["id"] == "small"
        refused = httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}, timeout=60)
        assert refused.status_code == 400
        assert "--allow-host" in refused.text  # what this server reads
        assert "SFT_ALLOWED_ORIGINS" not in refused.text
        foreign = httpx.get(f"{url}/health", headers={"Origin": "http://evil.example"}, timeout=60)
        assert foreign.status_code == 403
        assert "SFT_ALLOWED_ORIGINS" not in foreign.text
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) == 0


def _make_small(folder: Path) -> Path:
    """Write a model folder without weights."""
    from tasks.tokenization.saving import save_tokenizer
    from tasks.tokenization.templates import prepare_tokenizer

    folder.mkdir()
    shutil.copyfile(_BASE_MODEL / "config.json", folder / "config.json")
    save_tokenizer(prepare_tokenizer(_BASE_MODEL, None), folder)
    return folder


def test_vllms_command_is_printed_and_another_is_checked(tmp_path: Path) -> None:
    folder = _make_small(tmp_path / "small")
    done = _runner.invoke(app, ["serve-model", str(folder), "--engine", "vllm"])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("vllm serve"))
    assert f"vllm serve {folder} --served-model-name small --host 127.0.0.1" in line
    assert "--dtype float32 --max-model-len 512" in line
    assert "--tool-call-parser hermes" in line
    script = tmp_path / "serve.sh"
    script.write_text("# ours\n" + line.replace("hermes", "mistral").replace(" --host", " \\\n --host"))
    checked = _runner.invoke(app, ["serve-model", str(folder), "--engine", "vllm", "--check", str(script)])
    assert checked.exit_code == 1
    assert "--tool-call-parser hermes" in " ".join(checked.output.split())
    script.write_text(line)
    assert _runner.invoke(app, ["serve-model", str(folder), "--engine", "vllm", "--check", str(script)]).exit_code == 0


def test_vllm_serves_a_registered_version_from_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the cache is none that a person could name, and it is cleared."""
    monkeypatch.setenv("SFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    client = tracking.client()
    run = str(client.create_run(tracking.open_experiment("serving")).info.run_id)
    client.log_dict(run, {"tokenization": {"max_length": 512}}, tracking.CONFIG_FILE)
    uri, digest = tracking.publish(_make_small(tmp_path / "made"), run, "model")
    client.create_registered_model("small")
    client.create_model_version("small", uri, run, tags={versions.MODEL_TAG: digest, versions.RUN_TAG: run})
    asked = ["serve-model", "small/1", "--engine", "vllm"]
    done = _runner.invoke(app, asked)
    assert done.exit_code == 0, done.output
    copying, serving = done.stdout.splitlines()
    assert copying == "sft merge small/1 small-1"
    assert serving.startswith("vllm serve small-1 --served-model-name small --host 127.0.0.1")
    Path("serve.sh").write_text(done.stdout)
    assert _runner.invoke(app, [*asked, "--check", "serve.sh"]).exit_code == 0  # it will be copied
    assert _runner.invoke(app, copying.split()[1:]).exit_code == 0
    assert _runner.invoke(app, [*asked, "--check", "serve.sh"]).exit_code == 0
    Path("small-1/config.json").write_text("{}")
    assert _runner.invoke(app, [*asked, "--check", "serve.sh"]).exit_code == 1
