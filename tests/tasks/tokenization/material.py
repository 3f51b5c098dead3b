"""The tokenizers and templates that tests borrow, each template with the tokens it needs; skipped where absent."""

import copy
from pathlib import Path
from typing import Any

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

MATERIAL = Path(__file__).resolve().parents[3] / ".." / "shared" / "material"
TOKENIZERS = MATERIAL / "tokenizers"
TEMPLATES = MATERIAL / "templates"

_IM = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
_LLAMA3 = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
_GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
_COHERE = [
    "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
]  # fmt: skip
_DEEPSEEK = [
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁end｜>",
]  # fmt: skip
_GPTOSS = ["<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
_GEMMA4 = [
    "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>",
]  # fmt: skip
_GLM = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>"]
_MISTRAL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]"]  # fmt: skip

# Beginning of a template's name (longest wins): its tokens, bos, eos, and the end of turn as a person reads it;
# "or" separates the ends of a plain answer and of a tool call.
FAMILIES: dict[str, tuple[list[str], str | None, str, str | None]] = {
    "trl__qwen": (_IM, None, "<|endoftext|>", "<|im_end|>"),
    "trl__nemotron": (_IM, None, "<|endoftext|>", "<|im_end|>"),
    "axolotl__qwen": (_IM, None, "<|endoftext|>", "<|im_end|>"),
    "axolotl__chatml": (_IM, None, "<|endoftext|>", "<|im_end|>"),
    "axolotl__phi_4": ([*_IM, "<|im_sep|>"], None, "<|endoftext|>", "<|im_end|>"),
    "trl__lfm2": ([*_IM, "<|startoftext|>"], "<|startoftext|>", "<|endoftext|>", "<|im_end|>"),
    "trl__llama3": (_LLAMA3, "<|begin_of_text|>", "<|endoftext|>", "<|eot_id|>"),
    "axolotl__llama3": (_LLAMA3, "<|begin_of_text|>", "<|endoftext|>", "<|eot_id|>"),
    "trl__gemma": (_GEMMA, "<bos>", "<|endoftext|>", "<end_of_turn>"),
    "axolotl__gemma": (_GEMMA, "<bos>", "<|endoftext|>", "<end_of_turn>"),
    "trl__diffusion_gemma": (_GEMMA4, "<bos>", "<|endoftext|>", "<turn|> or <|tool_response>"),
    "trl__cohere": (_COHERE, "<BOS_TOKEN>", "<|endoftext|>", "<|END_OF_TURN_TOKEN|>"),
    "trl__deepseek": (_DEEPSEEK, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "trl__gptoss": (_GPTOSS, "<|startoftext|>", "<|return|>", "<|return|> or <|call|>"),
    "trl__glm4moe": (_GLM, None, "<|endoftext|>", None),
    "trl__glm4moe_training": (_GLM, None, "<|endoftext|>", "<|user|> or <|observation|>"),
    "trl__phi3": (["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], None, "<|endoftext|>", "<|end|>"),
    "axolotl__mistral": (_MISTRAL, "<s>", "</s>", "</s>"),
}
OWN_ENDINGS: dict[str, str] = {
    "qwen2.5-instruct": "<|im_end|>",
    "qwen2.5-base": "<|im_end|>",
    "phi-3-mini": "<|end|>",
    "tinyllama-1.1b-chat": "</s>",
    "smollm2-135m-instruct": "<|im_end|>",
    "mistral-7b-instruct-v0.3": "</s>",
    "minimind": "<|im_end|>",
}


def load(name: str) -> PreTrainedTokenizerBase:
    """Load one of the tokenizers."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(TOKENIZERS / name))
    return tokenizer


def family_of(template: str) -> tuple[list[str], str | None, str, str | None]:
    """Return what FAMILIES says of a template."""
    return FAMILIES[max((name for name in FAMILIES if template.startswith(name)), key=len)]


def dress(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """Copy a tokenizer with a template and the tokens it needs."""
    dressed = copy.deepcopy(tokenizer)
    tokens, bos, eos, _ = family_of(template)
    wanted = [*tokens, eos, *([bos] if bos else [])]
    open_tags = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    dressed.add_tokens(
        [AddedToken(token, special=token not in open_tags, normalized=False) for token in dict.fromkeys(wanted)]
    )
    dressed.eos_token = eos
    if bos:
        dressed.bos_token = bos
    dressed.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return dressed
