"""Tokenizers trained here and templates written here, in the manner of those that models ship with.

They need nothing borrowed, so that the laws of labels, assembly and serving are held in a fresh clone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.tasks.tokenization.conftest import CHATML, TEXTS

_LOOP = "{%- for m in messages -%}"
_END = "{%- endfor -%}"
_RAISE = "{{- raise_exception('this template knows no ' ~ m.role) -}}"


@dataclass(frozen=True)
class Family:
    """A template with the tokens that it needs."""

    template: str
    tokens: tuple[str, ...]
    end_of_turn: str | None
    """As a person reads it in the template; `or` separates those of an answer and of a call; None where eos follows."""
    ""
    bos: str | None = None
    eos: str = "<|endoftext|>"
    is_assembled: bool = True
    """Whether ordinary conversations are assembled without rendering, where words are encoded apart."""


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Tools in the system message, calls between tags, thoughts before the last answer only.
_CHATML_TOOLS = (
    "{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{%- if tools -%}<|im_start|>system\n{{ first }}\n# Tools\n{% for t in tools %}{{ t | tojson }}\n"
    "{% endfor %}<|im_end|>\n"
    "{%- elif first -%}<|im_start|>system\n{{ first }}<|im_end|>\n{%- endif -%}"
    + _LOOP
    + "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) -%}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}"
    "{%- set thought = m.reasoning_content or '' -%}{%- set said = m.content -%}"
    "{%- if '</think>' in said -%}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1] | trim -%}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if loop.last or thought and loop.index0 > 0 and false -%}"
    "{{ '<think>\n' ~ thought ~ '\n</think>\n\n' }}{%- endif -%}{{ said }}"
    "{%- for c in m.tool_calls or [] -%}"
    '{{ \'\n<tool_call>\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) '
    "~ '}\n</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- elif m.role == 'tool' -%}"
    "{{ '<|im_start|>user\n<tool_response>\n' ~ m.content ~ '\n</tool_response><|im_end|>\n' }}"
    "{%- endif -%}" + _END + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}"
    "{%- endif -%}"
)
_HEADERS = (
    "{{- bos_token -}}{%- if tools -%}{{ '<|head|>system<|/head|>\n\n' }}{% for t in tools %}"
    "{{ t | tojson }}\n\n{% endfor %}"
    "{{ '<|eot|>' }}{%- endif -%}"
    + _LOOP
    + "{{ '<|head|>' ~ ('ipython' if m.role == 'tool' else m.role) ~ '<|/head|>\n\n' }}"
    "{%- if m.tool_calls -%}{%- set f = m.tool_calls[0].function -%}"
    "{{ (m.content | trim) ~ '{\"name\": \"' ~ f.name ~ '\", \"parameters\": ' ~ (f.arguments | tojson) ~ '}' }}"
    "{%- else -%}{{ m.content | trim }}{%- endif -%}{{ '<|eot|>' }}"
    + _END
    + "{%- if add_generation_prompt -%}{{ '<|head|>assistant<|/head|>\n\n' }}{%- endif -%}"
)
# The system message goes into the last question.
_INSTRUCTIONS = (
    "{{- bos_token -}}{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
    "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}"
    "{%- for m in turns -%}{%- if m.role != ('assistant' if loop.index0 % 2 else 'user') -%}"
    + _RAISE
    + "{%- endif -%}{%- if m.role == 'user' -%}"
    "{{ '[INST]' ~ (' ' ~ system ~ '\n\n' if system and loop.last else ' ') ~ m.content ~ '[/INST]' }}"
    "{%- else -%}{{ ' ' ~ m.content ~ eos_token }}{%- endif -%}" + _END
)
_TURNS = (
    "{{- bos_token -}}" + _LOOP + "{%- if m.role not in ('user', 'assistant') -%}" + _RAISE + "{%- endif -%}"
    ""
    "{{ '<start_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (m.content | trim) ~ '<end_turn>\n' }}"
    + _END
    + "{%- if add_generation_prompt -%}{{ '<start_turn>model\n' }}{%- endif -%}"
)
# History without thoughts; arguments written as they are; the prompt opens a thought.
_OPEN_THOUGHT = (
    "{{- bos_token -}}" + _LOOP + "{%- if m.role == 'system' -%}{{ m.content }}"
    "{%- elif m.role == 'user' -%}{{ '<User>' ~ m.content }}"
    "{%- elif m.role == 'tool' -%}{{ '<Result>' ~ m.content ~ '</Result>' }}"
    "{%- else -%}{{ '<Assistant>' ~ m.content.split('</think>')[-1] }}"
    "{%- for c in m.tool_calls or [] -%}"
    "{{ '<Call>' ~ c.function.name ~ '\n' + c.function.arguments ~ '</Call>' }}{%- endfor -%}"
    "{{ eos_token }}{%- endif -%}" + _END + "{%- if add_generation_prompt -%}{{ '<Assistant><think>\n' }}{%- endif -%}"
)
_CLOSED_THOUGHT = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
_PARTS = (
    _LOOP + "{{ '<|im_start|>' ~ m.role ~ ':' }}{%- for part in m.content -%}"
    "{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}{%- endfor -%}{{ '<|im_end|>\n' }}"
    + _END
    + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant:' }}{%- endif -%}"
)
_PLAIN = (
    _LOOP
    + "{{ '\n### ' ~ m.role ~ ':\n' ~ m.content }}"
    + _END
    + "{%- if add_generation_prompt -%}{{ '\n### assistant:\n' }}{%- endif -%}"
)
# Answers and calls end in tokens of their own.
_CHANNELS = (
    "{%- for t in tools or [] -%}{{ '<|start|>tools<|message|>' ~ (t | tojson) ~ '<|end|>' }}{%- endfor -%}"
    + _LOOP
    + "{%- if m.tool_calls -%}"
    "{{ '<|start|>assistant' ~ ' to=' ~ m.tool_calls[0].function.name ~ '<|message|>' ~ m.content ~ "
    "(m.tool_calls[0].function.arguments | tojson) ~ '<|call|>' }}"
    "{%- elif m.role == 'assistant' -%}"
    "{{ '<|start|>assistant<|message|>' ~ m.content ~ ('<|return|>' if loop.last and not "
    "add_generation_prompt else '<|end|>') }}"
    "{%- else -%}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{%- endif -%}"
    + _END
    + "{%- if add_generation_prompt -%}{{ '<|start|>assistant' }}{%- endif -%}"
)

# Calls and results have ids of nine characters.
_NUMBERED_CALLS = (
    "{{- bos_token -}}{%- for t in tools or [] -%}{{ '[TOOLS]' ~ (t | tojson) ~ '[/TOOLS]' }}{%- endfor -%}"
    + _LOOP
    + "{%- if m.role == 'user' -%}{{ '[INST] ' ~ m.content ~ '[/INST]' }}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if not m.tool_call_id or m.tool_call_id | length != 9 -%}{{- raise_exception('ids have 9') -}}{%- endif -%}"
    "{{ '[RESULT]' ~ m.tool_call_id ~ ' ' ~ m.content ~ '[/RESULT]' }}"
    "{%- elif m.role == 'assistant' and messages[loop.index0 - 1].role != m.role -%}{{ ' ' ~ m.content }}"
    "{%- for c in m.tool_calls or [] -%}"
    "{%- if not c.id or c.id | length != 9 -%}{{- raise_exception('ids have 9') -}}{%- endif -%}"
    "{{ '[CALL]' ~ c.id ~ ' ' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson) ~ '[/CALL]' }}{%- endfor -%}"
    "{{ eos_token }}{%- else -%}" + _RAISE + "{%- endif -%}" + _END
)

# The next answer's beginning stands behind every conversation, asked for or not; two kinds of answers end alike.
_ALWAYS_PROMPTED = (
    "{{- bos_token -}}{%- for t in tools or [] -%}{{ '<|start|><|system|>' ~ (t | tojson) ~ '<|end|>' }}{%- endfor -%}"
    + _LOOP
    + "{%- if m.role != 'assistant' -%}{{ '<|start|><|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}"
    "{%- elif m.tool_calls -%}"
    "{{ '<|start|><|bot|><|act|>' ~ m.content }}{%- for c in m.tool_calls -%}{{ c.function | tojson }}{%- endfor -%}"
    "{{ '<|/act|><|end|>' }}"
    "{%- else -%}{{ '<|start|><|bot|><|say|>' ~ m.content ~ '<|/say|><|end|>' }}{%- endif -%}"
    + _END
    + "{{ '<|start|><|bot|>' }}"
)

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML, _CHATML_TOKENS, "<|im_end|>"),
    "chatml with tools": Family(
        _CHATML_TOOLS, (*_CHATML_TOKENS, "<tool_call>", "</tool_call>", "<think>", "</think>"), "<|im_end|>"
    ),
    "headers": Family(
        # Its two line ends are another word before an answer than alone.
        _HEADERS,
        ("<|head|>", "<|/head|>", "<|eot|>"),
        "<|eot|>",
        bos="<|begin|>",
        is_assembled=False,
    ),
    "instructions": Family(_INSTRUCTIONS, ("[INST]", "[/INST]"), "</s>", bos="<s>", eos="</s>"),
    "numbered calls": Family(
        _NUMBERED_CALLS,
        ("[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "[CALL]", "[/CALL]", "[RESULT]", "[/RESULT]"),
        "</s>",
        bos="<s>",
        eos="</s>",
    ),
    "always prompted": Family(
        _ALWAYS_PROMPTED,
        (
            *("<|start|>", "<|end|>", "<|bot|>", "<|user|>", "<|system|>", "<|tool|>"),
            *("<|say|>", "<|/say|>", "<|act|>", "<|/act|>"),
        ),
        "<|end|>",
        bos="<|begin|>",
        eos="<|end|>",
    ),
    "turns": Family(_TURNS, ("<start_turn>", "<end_turn>"), "<end_turn>", bos="<bos>"),
    "open thought": Family(
        _OPEN_THOUGHT,
        ("<User>", "<Assistant>", "<think>", "</think>", "<Call>", "</Call>", "<Result>", "</Result>"),
        "<|endoftext|>",
        bos="<|begin|>",
        is_assembled=False,
    ),
    "closed thought": Family(
        _CLOSED_THOUGHT, (*_CHATML_TOKENS, "<think>", "</think>"), "<|im_end|>", is_assembled=False
    ),
    "parts": Family(_PARTS, _CHATML_TOKENS, "<|im_end|>", is_assembled=False),
    "plain": Family(_PLAIN, (), None, is_assembled=False),
    "channels": Family(
        _CHANNELS,
        ("<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        "<|return|> or <|call|>",
        eos="<|return|>",
    ),
}
KINDS = ("bytes", "composed bytes", "pieces")
_OPEN_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@cache
def _train(kind: str) -> str:
    """Train a vocabulary of about 400 entries; as JSON."""
    if kind == "pieces":  # as sentence-piece BPE: spaces become a mark, unknown characters bytes
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, special = [], ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "composed bytes":
            backend.normalizer = normalizers.NFC()
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        backend.decoder = decoders.ByteLevel()
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), []
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(TEXTS, trainer)
    return str(backend.to_str())


def make(kind: str, name: str) -> PreTrainedTokenizerBase:
    """Return a tokenizer of a kind with a family's template and tokens."""
    family = FAMILIES[name]
    backend = Tokenizer.from_str(_train(kind))
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend)
    wanted = dict.fromkeys([*family.tokens, family.eos, *([family.bos] if family.bos else []), "<|pad|>"])
    tokenizer.add_tokens([AddedToken(token, special=token not in _OPEN_TAGS, normalized=False) for token in wanted])
    tokenizer.eos_token, tokenizer.pad_token = family.eos, "<|pad|>"
    if family.bos:
        tokenizer.bos_token = family.bos
    tokenizer.chat_template = family.template
    made: PreTrainedTokenizerBase = tokenizer
    return made
