"""What is shipped is what the seed gives, small enough, and loads without a network."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo.corpus import digest_documents
from deploy.demo.kinds import Thing, capitalize
from deploy.demo.rows import make_pairs, make_probe, make_rows, to_jsonl
from deploy.demo.vocabulary import train_tokenizer
from deploy.demo.world import make_things
from schemas.loading import load_config

Rows = list[dict[str, str]]


def test_dataset_is_rebuilt_byte_for_byte(demo: Path) -> None:
    train, held_out = make_rows()
    assert (demo / "data" / "train.jsonl").read_bytes() == to_jsonl(train)
    assert (demo / "data" / "heldout.jsonl").read_bytes() == to_jsonl(held_out)
    assert (demo / "data" / "probe.jsonl").read_bytes() == to_jsonl(make_probe())
    for name, pairs in zip(("pairs", "heldout-pairs"), make_pairs(), strict=True):
        assert (demo / "data" / f"{name}.jsonl").read_bytes() == to_jsonl(pairs)


def test_corpus_is_rebuilt_to_the_recorded_digest(demo: Path, documents: list[str]) -> None:
    record = json.loads((demo / "build.json").read_text(encoding="utf-8"))
    assert digest_documents(documents) == record["corpus"]["sha256"]
    assert len(documents) == record["corpus"]["num_documents"] == 21640


def test_tokenizer_is_rebuilt_from_the_corpus(demo: Path, documents: list[str], tmp_path: Path) -> None:
    train_tokenizer(documents).save_pretrained(str(tmp_path))
    rebuilt = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    shipped = json.loads((demo / "base_model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert rebuilt["model"]["vocab"] == shipped["model"]["vocab"]
    assert rebuilt["model"]["merges"] == shipped["model"]["merges"]


def test_dataset_has_the_planted_dirt_and_no_other(train_rows: Rows, held_out_rows: Rows) -> None:
    assert len(train_rows) == 898
    assert len(held_out_rows) == 205
    assert sum("output" not in row for row in train_rows) == 2
    assert sum("output" in row and not row["output"].strip() for row in train_rows) == 3
    whole = [json.dumps(row) for row in train_rows if row.get("output", "").strip()]
    assert sum(count - 1 for count in Counter(whole).values()) == 6
    assert len({json.dumps(row) for row in held_out_rows}) == 205


def test_dataset_speaks_both_languages(held_out_rows: Rows) -> None:
    chinese = [row for row in held_out_rows if not row["instruction"].isascii()]
    assert len(chinese) == 53


def test_base_model_is_small_and_fp32(demo: Path) -> None:
    folder = demo / "base_model"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12_000_000
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 (no iterator)
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors) == 2_755_072


def test_base_model_loads_offline_without_template(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(demo / "base_model")
    model = AutoModelForCausalLM.from_pretrained(demo / "base_model")
    assert tokenizer.chat_template is None
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 2048
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert model.generation_config.eos_token_id == [
        tokenizer.convert_tokens_to_ids("<|im_end|>"),
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    ]


def test_tokenizer_gives_a_name_the_same_tokens_in_question_and_answer(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "base_model")
    ids = tokenizer("Which river flows past Sylvhaven?\nThe town of Sylvhaven").input_ids
    name = tokenizer(" Sylvhaven").input_ids
    assert sum(ids[start : start + len(name)] == name for start in range(len(ids))) == 2
    text = "<|im_start|>鲤坞镇 naïve 🙂\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_base_model_knows_the_held_out_facts_in_running_text(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo / "base_model")
    model = AutoModelForCausalLM.from_pretrained(demo / "base_model")
    known = [_completes(model, tokenizer, thing) for thing in make_things() if thing.held_out]
    assert len(known) == 47
    assert sum(known) / len(known) >= 0.9


def test_demo_config_loads_and_its_files_exist(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = demo.parents[1]
    monkeypatch.chdir(root)
    config = load_config(Path("deploy/configs/demo.yaml"))
    assert (Path(config.model.base_model) / "config.json").is_file()
    assert Path(config.data.source).is_file()
    assert config.data.eval_source is not None
    assert Path(config.data.eval_source).is_file()
    assert config.data.max_rejected_fraction >= 5 / 898
    assert config.evaluation.max_examples >= 205


def _completes(model: torch.nn.Module, tokenizer: object, thing: Thing) -> bool:
    """Tell whether the model goes on with the right value after a statement about the thing has begun."""
    assert callable(tokenizer)
    attribute = thing.kind.attributes[0]
    statement = next(text for text in attribute.statements if text.index("{name}") < text.index("{value}"))
    start = statement.partition("{value}")[0].format(name=thing.mention).rstrip()
    whole = statement.partition("{value}")[0].format(name=thing.mention) + thing.values[attribute.name]
    num_start = len(tokenizer(capitalize(start)).input_ids)
    ids = torch.tensor(tokenizer(capitalize(whole)).input_ids)
    with torch.no_grad():
        guesses = model(ids[None]).logits[0, num_start - 1 : -1].argmax(-1)
    return bool((guesses == ids[num_start:]).all())
