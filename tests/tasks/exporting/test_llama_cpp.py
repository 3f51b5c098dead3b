"""llama.cpp reads our GGUF files as transformers reads the model: the same tokens, distributions and ends."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tasks.exporting.gguf_file import unfold, write_gguf
from tasks.models import load_tokenizer
from tests.llama_cpp import Question, Reading, ask_llama_cpp, why_missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_missing()), reason=why_missing())]

DEMO = Path(__file__).parents[3] / "deploy" / "demo" / "base_model"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "initializer_range": 0.2,  # so that positions and channels matter to the answers
}
END, PAD, START, TURN_END = 2044, 2045, 2046, 2047
PROMPTS = (
    "<|im_start|>user\nWhich river flows past Sylvhaven?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n盏耳花的花瓣是什么颜色？<|im_end|>\n<|im_start|>assistant\n",
    "The town of Harnholm lies on the river",
)
TEXTS = (
    *PROMPTS,
    "",
    " ",
    "a  b   c    \n\n  d\t\te \n",
    "1234567 and 12.5, 3rd of 1024",
    "it's WE'LL I'VE you're 'tis don'T",
    "naïve café Ångström ЖУК שלום नमस्ते",
    "😀👩‍👩‍👧 ﬁ № ½ ⅷ …",
    "for(i=0;i<10;++i){x[i]+=y;}//!!!\r\n",
    "<|im_end|><|endoftext|>  <|im_start|>\n",
    "<|im_end |> <im_end>",
)


@dataclass(frozen=True)
class Case:
    """A model and a form."""

    family: str
    kind: str
    rule: str = "qwen2"
    stops: tuple[int, ...] = (TURN_END, END)


CASES = {
    "qwen3 f32": Case("qwen3", "f32"),
    "qwen3 bf16": Case("qwen3", "bf16"),
    "qwen3 q8_0": Case("qwen3", "q8_0"),
    "qwen3 q4_0": Case("qwen3", "q4_0"),
    "llama f32": Case("llama", "f32", "llama-bpe", (START,)),
    "qwen2 f32": Case("qwen2", "f32", stops=(TURN_END, END, 100)),
    "mistral f16": Case("mistral", "f16", "gpt-2"),
}
LARGEST_KL = {"f32": 1e-4, "f16": 1e-4, "bf16": 1e-3, "q8_0": 0.01, "q4_0": 0.02}
"""Nats a token between llama.cpp and transformers with the file's own values. llama.cpp keeps keys and values in f16,
and rounds activations to the type of the weights that they meet, of q8_0 and q4_0 to 8 bits."""
NEAR = {"f32": 0.05, "f16": 0.05, "bf16": 0.2, "q8_0": 0.5, "q4_0": 0.5}
"""Nats between two tokens that rounding may put in either order."""


def make_model(case: Case, folder: Path) -> Path:
    shutil.copytree(DEMO, folder)
    torch.manual_seed(0)
    if case.family == "llama":
        LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=False)).save_pretrained(folder)
    elif case.family == "mistral":
        MistralForCausalLM(MistralConfig(**SIZES, head_dim=32, sliding_window=None)).save_pretrained(folder)
    elif case.family == "qwen2":
        Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(case.stops)}))
    values = json.loads((folder / "tokenizer.json").read_text())
    parts = values["pre_tokenizer"]["pretokenizers"]
    if case.rule == "llama-bpe":
        parts[0]["pattern"]["Regex"] = parts[0]["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    elif case.rule == "gpt-2":
        values["pre_tokenizer"] = {**parts[1], "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama_cpp")


@pytest.fixture(scope="module")
def readings(work: Path) -> dict[str, Reading]:
    questions = []
    for number, case in enumerate(CASES.values()):
        folder = make_model(case, work / f"model-{number}")
        write_gguf(folder, work / f"{number}.gguf", case.kind, name="x")
        ids = load_tokenizer(folder)(list(PROMPTS), add_special_tokens=False)["input_ids"]
        questions.append(Question(str(work / f"{number}.gguf"), TEXTS, ids, ids))
    return dict(zip(CASES, ask_llama_cpp(questions, work, num_tokens=2048), strict=True))


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_text_becomes_the_same_tokens(name: str, readings: dict[str, Reading], work: Path) -> None:
    tokenizer = load_tokenizer(work / f"model-{list(CASES).index(name)}")
    expected = tokenizer(list(TEXTS), add_special_tokens=False)["input_ids"]
    assert dict(zip(TEXTS, readings[name].tokens, strict=True)) == dict(zip(TEXTS, expected, strict=True))


def test_the_distributions_are_the_files(name: str, readings: dict[str, Reading], work: Path) -> None:
    number, case = list(CASES).index(name), CASES[name]
    unfold(work / f"model-{number}", work / f"{number}.gguf", work / f"unfolded-{number}")
    model: Any = AutoModelForCausalLM.from_pretrained(work / f"unfolded-{number}", dtype=torch.float32)
    tokenizer = load_tokenizer(work / f"model-{number}")
    assert len(readings[name].probabilities) == len(PROMPTS)
    for prompt, found, answer in zip(PROMPTS, readings[name].probabilities, readings[name].answers, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            ours = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        here, theirs = ours[: len(ids)], found.clamp(min=1e-30).log()
        assert float((here.exp() * (here - theirs)).sum(-1).mean()) < LARGEST_KL[case.kind]
        chosen = torch.tensor([*theirs.argmax(-1)[:-1], *(answer or [int(theirs[-1].argmax())])])[:, None]
        given_up = ours[: len(chosen)].max(-1).values - ours[: len(chosen)].gather(-1, chosen)[:, 0]
        assert float(given_up.max()) < NEAR[case.kind]


def test_what_ends_an_answer_is_the_models(name: str, readings: dict[str, Reading]) -> None:
    assert set(CASES[name].stops) <= set(readings[name].ends)
    assert not {PAD, 0, 500} & set(readings[name].ends)
