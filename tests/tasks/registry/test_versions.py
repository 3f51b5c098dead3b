"""A registered version answers chat requests with the prompt ids of training, also where the tokenizer adds BOS."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from schemas.loading import parse_config
from tasks import tracking
from tasks.registry import versions

pytestmark = pytest.mark.usefixtures("tracked")
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
_QUESTION = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    vocabulary = {"<s>": 0, "</s>": 1, "<u>": 2, "<a>": 3}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary |= {letter: 4 + place for place, letter in enumerate(alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.add_special_tokens(["<s>", "</s>", "<u>", "<a>"])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def logged(model_folder: Path, tracking_home: Path) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFT_HOME", str(tracking_home))
        config = parse_config({"name": "reg", "model": {"base_model": "b"}, "data": {"source": "d"}})
        run_id = tracking.create_parent_run(config, run_name="r", config_digest="c", tags={})
        uri = versions.log_merged_model(model_folder, run_id, question="hi")
        tracking.end_run(run_id, "FINISHED")
    return run_id, uri


def _register(logged: tuple[str, str], name: str, tag: str) -> str:
    entry = versions.create_version(name, logged[1], run_id=logged[0], metrics={"nll": 1.5}, tags={"sft.run": tag})
    return str(entry.version)


def test_versions_count_up_and_are_found_by_their_run(logged: tuple[str, str]) -> None:
    assert _register(logged, "counted", "run-1") == "1"
    assert _register(logged, "counted", "run-2") == "2"
    found = versions.find_version("counted", "sft.run", "run-1")
    assert found is not None
    assert str(found.version) == "1"
    assert versions.find_version("counted", "sft.run", "run-3") is None
    versions.set_alias("counted", "champion", "1")
    versions.set_alias("counted", "challenger", "2")
    versions.set_alias("counted", "champion", "2")
    assert versions.aliases_of("counted", "1") == ()
    assert versions.aliases_of("counted", "2") == ("challenger", "champion")


def test_a_version_carries_signature_example_and_metrics(logged: tuple[str, str]) -> None:
    version = _register(logged, "described", "run-1")
    info = mlflow.models.get_model_info(f"models:/described/{version}")
    assert info.signature is not None
    assert "messages" in info.signature.inputs.input_names()
    assert info.saved_input_example_info is not None
    model_id = logged[1].removeprefix("models:/")
    metrics = tracking.client().get_logged_model(model_id).metrics or []
    assert {metric.key: metric.value for metric in metrics} == {"nll": 1.5}


def test_no_weights_are_loaded_to_log_a_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *arguments, **_: loads.append(arguments))
    run = tracking.client().create_run(tracking.open_experiment("weights"))
    versions.log_merged_model(model_folder, str(run.info.run_id), question="hi")
    assert loads == []


def test_the_folder_of_a_version_loads_with_plain_transformers(logged: tuple[str, str], model_folder: Path) -> None:
    version = _register(logged, "plain", "run-1")
    local = Path(mlflow.artifacts.download_artifacts(f"models:/plain/{version}")) / tracking.MODEL_SUBFOLDER
    here = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(local).state_dict().items():
        assert torch.equal(value, here[name])
    assert AutoTokenizer.from_pretrained(local).chat_template == _TEMPLATE


def _serve(logged: tuple[str, str], name: str) -> Any:
    version = _register(logged, name, "run-1")
    versions.set_alias(name, "champion", version)
    return mlflow.pyfunc.load_model(f"models:/{name}@champion")


def test_served_prompt_has_bos_once_and_the_answer_is_greedy(logged: tuple[str, str], model_folder: Path) -> None:
    served = _serve(logged, "served")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids: Any = tokenizer.apply_chat_template(_QUESTION, add_generation_prompt=True, return_dict=False)
    assert ids[:2] == [0, 2]
    assert ids.count(0) == 1
    assert served.unwrap_python_model().prompt_ids(_QUESTION) == ids
    answer = served.predict({"messages": _QUESTION, "max_tokens": 6})
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_stop_cuts_the_answer(logged: tuple[str, str]) -> None:
    served = _serve(logged, "stopped")
    text = served.predict({"messages": _QUESTION, "max_tokens": 6})["choices"][0]["message"]["content"]
    cut = served.predict({"messages": _QUESTION, "max_tokens": 6, "stop": [text[1]]})["choices"][0]
    assert cut["message"]["content"] == text.split(text[1])[0]
    assert cut["finish_reason"] == "stop"


# Killed while MLflow takes the files to its store: the entry is there, and some of the files.
_KILLED = """
import os, signal, sys
import os
import signal
import subprocess
import sys
from pathlib import Path
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from tasks.registry import versions

def stop(self, *_, **__):
    Path(self.artifact_dir).mkdir(parents=True, exist_ok=True)
    (Path(self.artifact_dir) / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)

LocalArtifactRepository.log_artifacts = stop
versions.log_merged_model(Path(sys.argv[1]), sys.argv[2], question="hi")
"""


def test_what_a_killed_attempt_began_to_log_is_cleared_by_the_next_one(model_folder: Path, tracking_home: Path) -> None:
    config = parse_config({"name": "killed", "model": {"base_model": "b"}, "data": {"source": "d"}})
    run_id = tracking.create_parent_run(config, run_name="r", config_digest="c", tags={})
    whole = versions.log_merged_model(model_folder, run_id, question="hi")
    command = [sys.executable, "-c", _KILLED, str(model_folder), run_id]
    environment = {**os.environ, "SFT_HOME": str(tracking_home)}
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == -signal.SIGKILL
    client, experiment = tracking.client(), str(tracking.get_run(run_id).info.experiment_id)
    (pending,) = (model for model in client.search_logged_models([experiment]) if model.status != "READY")
    place = Path(pending.artifact_location.removeprefix("file://"))
    assert (place / "half").is_file()
    again = versions.log_merged_model(model_folder, run_id, question="hi")
    left = client.search_logged_models([experiment])
    assert {model.model_uri: str(model.status) for model in left} == {whole: "READY", again: "READY"}
    assert not place.exists()
