from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from schemas.config import TokenizationConfig
from tasks.tokenization.masking import build_examples
from tasks.tokenization.templates import TemplateError, prepare_tokenizer
from tests.tasks.tokenization import oracle
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import CONVERSATIONS, say
from tests.tasks.tokenization.material import TOKENIZERS


def saved(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    tokenizer.save_pretrained(str(folder))
    return folder


def test_a_tokenizers_own_template_is_kept(tmp_path: Path) -> None:
    prepared = prepare_tokenizer(saved(make_tokenizer(CHATML), tmp_path), None)
    assert prepared.tokenizer.chat_template == CHATML
    assert len(prepared.template_digest) == 64
    ids = [prepared.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert prepared.stop_token_ids == tuple(ids)


def test_a_base_model_with_chatml_tokens_gets_chatml_and_no_new_id(tmp_path: Path) -> None:
    folder = saved(make_tokenizer(None), tmp_path)
    prepared = prepare_tokenizer(folder, None)
    assert "chatml" in prepared.notes[0]
    assert len(prepared.tokenizer) == len(make_tokenizer(None))
    (example,) = build_examples(say("s:Be brief.", "u:Why?", "a:Because."), prepared.tokenizer)
    assert prepared.tokenizer.decode(example.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause.<|im_end|>"
    )


@pytest.mark.parametrize("shape", [name for name in CONVERSATIONS if name != "tool text arguments"])
@pytest.mark.parametrize(("template", "end_of_turn"), [("chatml", "<|im_end|>"), ("plain", "<|endoftext|>")])
def test_built_in_templates_keep_the_law_with_tools_too(
    tmp_path: Path, shape: str, template: str, end_of_turn: str
) -> None:
    tokenizer = prepare_tokenizer(saved(make_tokenizer(None), tmp_path), template).tokenizer
    messages, tools = CONVERSATIONS[shape]
    config = TokenizationConfig(max_length=100_000)
    examples = build_examples(messages, tokenizer, tools=tools, config=config)
    pairs = [(example.input_ids, example.labels) for example in examples]
    assert oracle.check(tokenizer, messages, tools, pairs, end_of_turn) == oracle.Verdict("kept")


def test_the_template_file_of_the_config_is_used(tmp_path: Path) -> None:
    folder = saved(make_tokenizer(CHATML), tmp_path / "model")
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("assistant", "helper"), encoding="utf-8")
    prepared = prepare_tokenizer(folder, str(file))
    assert "helper" in str(prepared.tokenizer.chat_template)
    assert prepared.template_digest != prepare_tokenizer(folder, None).template_digest


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("llama", "give chatml, llama3, .*plain, or the path of a .jinja file"),
        ("no.jinja", r"no\.jinja.*cannot be read"),
    ],
)
def test_a_template_that_does_not_exist_is_a_clear_error(tmp_path: Path, choice: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        prepare_tokenizer(saved(make_tokenizer(CHATML), tmp_path), choice)


def test_a_template_that_is_not_jinja_is_a_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("{% for %}", encoding="utf-8")
    with pytest.raises(TemplateError, match="not valid Jinja"):
        prepare_tokenizer(saved(make_tokenizer(CHATML), tmp_path / "model"), str(file))


def test_a_missing_pad_token_is_an_unused_token_before_it_is_eos(tmp_path: Path) -> None:
    unused = prepare_tokenizer(saved(make_tokenizer(CHATML, pad=None), tmp_path / "unused"), None)
    assert unused.tokenizer.pad_token == "<|pad|>"


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="borrowed tokenizers are not here")
class TestBorrowed:
    def test_gpt2_gets_plain_text_turns_that_end_in_eos(self) -> None:
        prepared = prepare_tokenizer(TOKENIZERS / "gpt2", None)
        assert len(prepared.tokenizer) == 50257
        assert prepared.tokenizer.pad_token_id == prepared.tokenizer.eos_token_id == 50256
        (example,) = build_examples(say("u:Why?", "a:Because.", "u:And?", "a:So."), prepared.tokenizer)
        assert prepared.tokenizer.decode([label for label in example.labels if label != -100]) == (
            "Because.<|endoftext|>So.<|endoftext|>"
        )
        assert prepared.stop_token_ids == (50256,)

    def test_a_tokenizer_that_adds_bos_gets_a_template_that_writes_it_once(self) -> None:
        prepared = prepare_tokenizer(TOKENIZERS / "tok512-tinystories", None)
        (example,) = build_examples(say("u:Why?", "a:Because."), prepared.tokenizer)
        assert example.input_ids[0] == 1
        assert example.input_ids.count(1) == 1
        assert example.labels[-1] == 2

    def test_mistral_gets_a_reserved_token_as_pad(self) -> None:
        assert prepare_tokenizer(TOKENIZERS / "mistral-7b-instruct-v0.3", None).tokenizer.pad_token == "[control_8]"
