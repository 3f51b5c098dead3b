"""Ollama's Modelfile beside a GGUF file: where the model is, how it is prompted, and what ends an answer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tasks.models import load_tokenizer

_CHATML = '''TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
'''
_TRIALS: tuple[tuple[Mapping[str, str], ...], ...] = (
    ({"role": "user", "content": "a"},),
    ({"role": "system", "content": "be brief"}, {"role": "user", "content": "a b"}),
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}),
)


def write_modelfile(folder: Path, gguf_name: str, *, stops: Sequence[int]) -> tuple[str, str]:
    """Return a Modelfile, and a sentence where it has no template.

    Ollama has a template language of its own. One is written where it gives the very prompts of the model's own
    template in three conversations.

    Args:
        folder: of the model, with its tokenizer.
        gguf_name: of the file, in the Modelfile's own folder.
        stops: ids that end a generation.
    """
    tokenizer = load_tokenizer(folder)
    is_chatml = all(_render(tokenizer, trial) == _write_chatml(trial) for trial in _TRIALS)
    ends = "".join(f'PARAMETER stop "{tokenizer.decode([stop])}"\n' for stop in stops)
    text = f"FROM ./{gguf_name}\n{_CHATML if is_chatml else ''}PARAMETER temperature 0\n{ends}"
    if is_chatml:
        return text, ""
    return text, (
        "the Modelfile has no TEMPLATE: the model's chat template is not chatml, and Ollama takes one that it knows by "
        "the template in the GGUF file, or none: compare a prompt before use (ollama show --template)"
    )


def _render(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may refuse a role, or there is none
        return ""
    return str(text)


def _write_chatml(messages: Sequence[Mapping[str, str]]) -> str:
    """Return what Ollama makes of a conversation by the template above."""
    turns = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return f"{turns}<|im_start|>assistant\n"
