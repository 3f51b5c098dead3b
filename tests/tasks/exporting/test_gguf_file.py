"""A GGUF file holds every tensor of the model within its type's rounding, where llama.cpp looks for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tasks.exporting.errors import ExportError
from tasks.exporting.gguf_file import TYPES, check_file, read_gguf, unfold, write_gguf
from tasks.exporting.gguf_names import interleave, separate

DEMO = Path(__file__).parents[3] / "deploy" / "demo" / "base_model"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 128,
}


@pytest.fixture(params=["qwen3", "llama", "qwen2"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    torch.manual_seed(0)
    if request.param == "llama":
        LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(folder)
    elif request.param == "qwen2":
        Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2046, 2044]}))
    return folder


@torch.no_grad()
def answer(folder: Path) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: torch.Tensor = loaded(torch.arange(40)[None]).logits
    return logits


@pytest.mark.parametrize("kind", TYPES)
def test_the_file_is_the_model(model: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.gguf"
    tensors = load_file(model / "model.safetensors")
    assert write_gguf(model, file, kind, name="x") == len(tensors)
    assert set(read_gguf(model, file)) == set(tensors)
    unfold(model, file, tmp_path / "again")
    expected, found = answer(model), answer(tmp_path / "again")
    if kind == "f32":
        assert torch.equal(expected, found)
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    assert float(divergence.sum(-1).mean()) < (0.5 if kind == "q4_0" else 2e-3)


def test_a_plain_reader_finds_sizes_tokens_and_ends(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "x.gguf", "q8_0", name="mine")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")

    def read(name: str) -> Any:
        return reader.fields[name].contents()

    config = json.loads((model / "config.json").read_text())
    arch = read("general.architecture")
    assert arch == config["model_type"]
    assert read(f"{arch}.block_count") == config["num_hidden_layers"]
    assert read(f"{arch}.attention.head_count_kv") == 2
    assert (read("tokenizer.ggml.model"), read("tokenizer.ggml.pre")) == ("gpt2", "qwen2")
    assert (read("tokenizer.ggml.eos_token_id"), read("tokenizer.ggml.eot_token_id")) == (2046, 2044)
    tokens, kinds = read("tokenizer.ggml.tokens"), read("tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 2048
    assert (tokens[2046], kinds[2046]) == ("<|im_start|>", gguf.TokenType.CONTROL)
    assert len({tensor.name for tensor in reader.tensors}) == len(load_file(model / "model.safetensors"))


def test_llamas_heads_are_laid_out_in_pairs() -> None:
    rows = np.arange(8)[:, None]  # two heads of four rows: halves (0, 1) and (2, 3)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert np.array_equal(separate(interleave(rows, 2), 2), rows)


def test_a_tensor_that_is_another_is_found(model: Path, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "x.gguf", "q8_0", name="x")
    tensors = {key: value.clone() for key, value in load_file(model / "model.safetensors").items()}
    name = next(name for name in tensors if "mlp.up_proj" in name)
    wrong = {**tensors, name: tensors[name] + 0.02 * tensors[name].abs().max()}
    save_file(wrong, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"mlp\.up_proj\.weight is not the model's within the rounding of Q8_0"):
        check_file(model, tmp_path / "x.gguf")
    save_file({**tensors, "model.layers.0.extra.weight": tensors[name].clone()}, model / "model.safetensors")
    with pytest.raises(ExportError, match=r"no place for model\.layers\.0\.extra\.weight"):
        write_gguf(model, tmp_path / "y.gguf", "q8_0", name="x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma3_text"}, "the family gemma3_text is not written"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "positions of the type yarn"),
        ({"sliding_window": 64, "use_sliding_window": True}, "a sliding window of 64 tokens"),
    ],
)
def test_what_would_be_another_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(ExportError, match=message):
        write_gguf(folder, tmp_path / "x.gguf", "q8_0", name="x")


def test_an_end_that_has_no_place_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2047, 2044, 100]}))
    write_gguf(folder, tmp_path / "x.gguf", "f32", name="x")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert [fields[f"tokenizer.ggml.{end}_token_id"].contents() for end in ("eos", "eot", "eom")] == [2047, 2044, 100]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2047, 2044, 100, 101]}))
    with pytest.raises(ExportError, match="names 4 tokens that end an answer; a GGUF file has places for 3"):
        write_gguf(folder, tmp_path / "y.gguf", "f32", name="x")


def test_a_tokenizer_that_llama_cpp_cannot_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"a rule that llama\.cpp has no name for"):
        write_gguf(folder, tmp_path / "x.gguf", "q8_0", name="x")
