"""Generation prompts that end in a thought, arguments of templates, and every trained end of turn as a stop."""

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.config import TokenizationConfig
from tasks.models import load_tokenizer
from tasks.tokenization.examples import tokenize_dataset
from tasks.tokenization.masking import MaskError, build_examples
from tasks.tokenization.templates import TemplateError, prepare_tokenizer
from tests.tasks.tokenization.conftest import CHATML, make_tokenizer
from tests.tasks.tokenization.conversations import TOOLS, call, say
from tests.tasks.tokenization.test_examples import write
from tests.tasks.tokenization.test_masking import said, served

HISTORY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
OPEN = HISTORY + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
CLOSED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
SWITCH = HISTORY + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% if enable_thinking is defined and not "
    "enable_thinking %}</think>{% else %}{{ '\\n' }}{% endif %}{% endif %}"
)


def test_behind_a_closed_thought_the_answer_follows() -> None:
    tokenizer = make_tokenizer(CLOSED)
    messages = say("u:q", "a:x", "u:r", "a:y")
    examples = build_examples(messages, tokenizer)
    assert [said(tokenizer, example) for example in examples] == ["x<|im_end|>", "y<|im_end|>"]
    assert str(tokenizer.decode(examples[0].input_ids)).endswith("<think>\n\n</think>\n\nx<|im_end|>")
    assert examples[1].input_ids[: len(served(tokenizer, messages[:3]))] == served(tokenizer, messages[:3])


@pytest.mark.parametrize(
    ("answer", "target"),
    [
        (say("a:4", reasoning_content="Add."), "Add.\n</think>\n\n4<|im_end|>"),
        (say("a:<think>Add.</think>4"), "Add.</think>4<|im_end|>"),
        (say("a:<think>\nAdd.\n</think>\n\n4"), "Add.\n</think>\n\n4<|im_end|>"),
    ],
)
def test_behind_an_open_thought_come_reasoning_close_tag_and_answer(answer: Any, target: str) -> None:
    tokenizer = make_tokenizer(OPEN)
    (example,) = build_examples([*say("u:2 + 2?"), *answer], tokenizer)
    assert said(tokenizer, example) == target
    assert str(tokenizer.decode(example.input_ids)).endswith("<|im_start|>assistant\n<think>\n" + target)


@pytest.mark.parametrize("template", [OPEN, SWITCH])
def test_an_answer_without_reasoning_is_refused_with_advice_that_works(tmp_path: Path, template: str) -> None:
    messages = say("u:q", "a:x")
    make_tokenizer(template).save_pretrained(str(tmp_path))
    with pytest.raises(MaskError) as caught:
        build_examples(messages, prepare_tokenizer(tmp_path, None).tokenizer)
    assert caught.value.reason == "missing_reasoning"
    text = str(caught.value)
    assert ('template_arguments: {"enable_thinking": false}' in text) == (template == SWITCH)
    assert "give its reasoning_content" in text
    assert "model.chat_template: chatml" in text
    reasoned = say("u:q", "a:x", reasoning_content="Why not.")
    for given, chat_template, arguments in (
        (reasoned, None, {}),
        (messages, "chatml", {}),
        *([(messages, None, {"enable_thinking": False})] if template == SWITCH else []),
    ):
        tokenizer = prepare_tokenizer(tmp_path, chat_template, arguments).tokenizer
        (example,) = build_examples(given, tokenizer)
        assert said(tokenizer, example).endswith("x<|im_end|>")


def test_arguments_of_the_template_are_saved_with_it_and_a_request_has_the_last_word(tmp_path: Path) -> None:
    make_tokenizer(SWITCH).save_pretrained(str(tmp_path / "model"))
    config = TokenizationConfig(template_arguments={"enable_thinking": False, "name": 'a "b" 🙂'})
    prepared = prepare_tokenizer(tmp_path / "model", None, config.template_arguments)
    dataset = write(tmp_path / "data", [say("u:q", "a:x")], [say("u:r", "a:y")])
    tokenize_dataset(dataset, prepared, tmp_path / "tokens", config)
    saved = load_tokenizer(tmp_path / "tokens" / "tokenizer")
    prompt = say("u:q")
    text: Any = saved.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<think></think>")
    asked: Any = saved.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, enable_thinking=True)
    assert asked.endswith("<think>\n")
    again = prepare_tokenizer(tmp_path / "tokens" / "tokenizer", None, config.template_arguments)
    assert again.template_digest == prepared.template_digest
    written = str(prepared.tokenizer.chat_template).partition("{% for")[0] + "{{ name }}"
    assert make_tokenizer(written).apply_chat_template(prompt, tokenize=False) == 'a "b" 🙂'


@pytest.mark.parametrize("name", ["messages", "not a name", "tools"])
def test_an_argument_that_no_template_can_take_is_a_clear_error(tmp_path: Path, name: str) -> None:
    make_tokenizer(CHATML).save_pretrained(str(tmp_path))
    with pytest.raises(TemplateError, match=r"template_arguments"):
        prepare_tokenizer(tmp_path, None, {name: True})


def test_every_trained_end_of_turn_is_a_stop_of_the_saved_generation_config(tmp_path: Path) -> None:
    template = (
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}<|call|>{% else %}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = make_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.save_pretrained(str(tmp_path / "model"))
    prepared = prepare_tokenizer(tmp_path / "model", None)
    dataset = write(tmp_path / "data", [say("u:q", "a:x")], [say("u:q", "a:x")])
    import polars as pl

    frame = pl.read_parquet(dataset / "train.parquet")
    called = [*say("u:q"), call({"city": "Rome"})]
    frame = pl.concat([frame, frame.with_columns(messages=pl.lit(json.dumps(called)), tools=pl.lit(json.dumps(TOOLS)))])
    frame.write_parquet(dataset / "train.parquet")
    tokenize_dataset(dataset, prepared, tmp_path / "tokens", TokenizationConfig())
    saved = json.loads((tmp_path / "tokens" / "tokenizer" / "generation_config.json").read_text(encoding="utf-8"))
    wanted = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>", "<|call|>")]
    assert saved["eos_token_id"] == wanted
    masks = json.loads((tmp_path / "tokens" / "masks.json").read_text(encoding="utf-8"))
    assert masks["stop_token_ids"] == wanted
    assert masks["train"]["ending_ids"] == {str(wanted[0]): 1, str(wanted[2]): 1}
