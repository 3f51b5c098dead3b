"""The templates that are written here hold the laws of labels and of serving, on tokenizers of every kind."""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schemas.config import TokenizationConfig
from schemas.llamafactory.settings import TEMPLATES
from tasks.prompts import PromptSettings, make_prompt
from tasks.tokenization.literals import control_tokens
from tasks.tokenization.masking import MaskError, build_examples
from tasks.tokenization.rendering import open_chat
from tasks.tokenization.templates import BUILT_IN, TemplateError, prepare_tokenizer
from tests.tasks.tokenization import oracle, own
from tests.tasks.tokenization.conftest import CHATML
from tests.tasks.tokenization.conversations import CONVERSATIONS, say

LONG = TokenizationConfig(max_length=100_000)
END = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi3": "<|end|>",
    "phi4": "<|im_end|>",
}
# Of the conversations of CONVERSATIONS without tools, those that a template with turns in order or trimmed contents
# does not keep.
_STRICT = {"two in a row", "system late"}
TOOLS = {"chatml", "plain"}
# What a person reads of them, for one system message, question and answer.
TEXTS = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "mistral": "<s>[INST] S\n\nQ[/INST] A</s>",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    "phi3": "<s><|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "phi4": "<s><|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A<|im_end|>",
    "deepseek": "<s>S\n\nUser: Q\n\nAssistant: A</s>",
    "deepseek3": "<s>S<｜User｜>Q<｜Assistant｜>A</s>",
    "zephyr": "<s><|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n",
    "vicuna": "<s>S USER: Q ASSISTANT: A</s>",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n",
    "plain": "<s>### System:\nS\n\n### User:\nQ\n\n### Assistant:\nA</s>\n",
}


# Between the end of an answer and the next question.
SECOND = {
    "chatml": "<|im_start|>user\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n",
    "mistral": "[INST] ",
    "llama2": "<s>[INST] ",
    "gemma": "<start_of_turn>user\n",
    "phi3": "<|user|>\n",
    "phi4": "<|im_start|>user<|im_sep|>",
    "deepseek": "User: ",
    "deepseek3": "<｜User｜>",
    "zephyr": "<|user|>\n",
    "vicuna": "USER: ",
    "alpaca": "### Instruction:\n",
    "plain": "### User:\n",
}


def make_folder(kind: str, name: str, folder: Path, *, template: str | None = None) -> Path:
    """Save a tokenizer of a kind that has the tokens of a built-in template, and puts bos in front of texts."""
    backend = Tokenizer.from_str(own._train(kind))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens = dict.fromkeys([*BUILT_IN[name], "<s>", "</s>", "<pad>"])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<s>", "</s>", "<pad>"
    if name != "chatml":
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.convert_tokens_to_ids("<s>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return folder


def prepare(kind: str, name: str, folder: Path) -> PreTrainedTokenizerBase:
    return prepare_tokenizer(make_folder(kind, name, folder), name).tokenizer


def test_every_template_has_its_file_and_its_text_here() -> None:
    folder = Path(prepare_tokenizer.__code__.co_filename).parent
    assert {path.stem for path in folder.glob("*.jinja")} == set(BUILT_IN) == set(TEXTS)
    assert set(TEMPLATES.values()) <= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_template_writes_what_it_is_known_for(tmp_path: Path, name: str) -> None:
    tokenizer: Any = prepare("bytes", name, tmp_path)
    messages = say("s:S", "u:Q", "a:A")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == TEXTS[name]
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert TEXTS[name].startswith(prompt)
    assert TEXTS[name][len(prompt) :].lstrip().startswith("A")
    several = tokenizer.apply_chat_template([*messages, *say("u:R", "a:B")], tokenize=False)
    assert several.startswith(TEXTS[name])
    assert several[len(TEXTS[name]) :].startswith(SECOND[name] + "R")


@pytest.mark.parametrize("kind", own.KINDS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_no_conversation_is_masked_wrongly(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer = prepare(kind, name, tmp_path)
    wrong, kept, reasons = [], set(), {}
    for shape, (messages, tools) in CONVERSATIONS.items():
        try:
            examples = build_examples(messages, tokenizer, tools=tools, config=LONG)
        except MaskError as error:
            reasons[shape] = error.reason
            continue
        pairs = [(example.input_ids, example.labels) for example in examples]
        verdict = oracle.check(tokenizer, messages, tools, pairs, END.get(name, "</s>"))
        wrong += [f"{shape}: {verdict.why}"] if verdict.kind == "wrong" else []
        kept |= {shape} if verdict.kind == "kept" else set()
    assert not wrong
    if kind != "pieces":  # such a tokenizer puts spaces behind tokens, so that some texts have no ids
        plain = {shape for shape, (_, tools) in CONVERSATIONS.items() if tools is None and shape.count("reason") == 0}
        assert len(kept & plain) >= 0.6 * len(plain), reasons


@pytest.mark.parametrize("kind", own.KINDS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_served_prompt_is_that_of_training(tmp_path: Path, name: str, kind: str) -> None:
    tokenizer = prepare(kind, name, tmp_path)
    chat = open_chat(tokenizer)
    settings = PromptSettings(chat.forms, tuple(sorted(control_tokens(chat))))
    for row in (say("u:Why?", "a:Because."), say("s:Be brief.", "u:a", "a:b", "u:c", "a:d e")):
        *_, example = build_examples(row, tokenizer, config=TokenizationConfig(max_length=1000, train_on="last_turn"))
        trained = example.input_ids[: example.spans[-1][0]]
        assert make_prompt(tokenizer, settings, row[:-1]) == trained
        assert trained[:1] == [tokenizer.bos_token_id] or name == "chatml"
        assert trained.count(tokenizer.bos_token_id) == (2 if name == "llama2" and len(row) > 2 else name != "chatml")


def test_rows_with_tools_are_refused_by_templates_without(tmp_path: Path) -> None:
    messages, tools = CONVERSATIONS["tool call"]
    for name in set(BUILT_IN) - TOOLS:
        tokenizer = prepare("bytes", name, tmp_path / name)
        with pytest.raises(MaskError, match="knows no tools"):
            build_examples(messages, tokenizer, tools=tools, config=LONG)


def test_template_whose_tokens_are_missing_is_refused_or_where_it_is_a_default_left_out(tmp_path: Path) -> None:
    folder = make_folder("bytes", "vicuna", tmp_path)
    with pytest.raises(TemplateError, match=r"'llama3' writes <\|start_header_id\|>, .*choose one of mistral, llama2"):
        prepare_tokenizer(folder, "llama3")
    prepared = prepare_tokenizer(folder, "default:llama3")
    assert prepared.notes[0].startswith("The built-in chat template plain is used")
    assert "the vocabulary has no <|start_header_id|>" in prepared.notes[0]
    with pytest.raises(TemplateError, match=re.escape("give chatml, llama3, gemma, phi3")):
        prepare_tokenizer(folder, "llama33")


def test_default_gives_way_to_the_tokenizers_own_template_and_a_name_does_not(tmp_path: Path) -> None:
    folder = make_folder("bytes", "chatml", tmp_path / "own", template=CHATML)
    assert prepare_tokenizer(folder, "default:vicuna").tokenizer.chat_template == CHATML
    assert "USER:" in str(prepare_tokenizer(folder, "vicuna").tokenizer.chat_template)
    bare = make_folder("bytes", "chatml", tmp_path / "bare")
    assert "USER:" in str(prepare_tokenizer(bare, "default:vicuna").tokenizer.chat_template)
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("assistant", "helper"), encoding="utf-8")
    assert prepare_tokenizer(folder, f"default:{file}").tokenizer.chat_template == CHATML
    assert "helper" in str(prepare_tokenizer(bare, f"default:{file}").tokenizer.chat_template)
