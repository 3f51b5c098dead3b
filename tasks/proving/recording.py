"""Records what a version and its base answer to probes, and how much rounding changes that.

Dimensions: `K` tokens of an answer, `V` vocabulary.
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from schemas.proofs import Alternatives, RecordedAnswer, ServingProbe, ServingProbes
from tasks.evaluation.generation import context_length, find_stop_ids, generate_greedy
from tasks.evaluation.padded import forward, pad_left
from tasks.models import choose_device, load_model, load_tokenizer
from tasks.prompts import load_settings
from tasks.proving.questions import choose_questions

FILE = "probes.json"
NUM_TOKENS = 32
"""Of an answer."""
NUM_ALTERNATIVES = 8
LONGEST = {"cuda": 8192, "cpu": 1024}
"""Tokens of the longest prompt; where a served context is cut above it, the answers are the same."""
_16_BIT = (torch.bfloat16, torch.float16)


def record_answers(base: Path, model: Path, dataset: Path, folder: Path) -> Path:
    """Ask a version and its base some requests, and write probes.json into a folder.

    Args:
        base: folder of the base model.
        model: folder of the version, with its tokenizer.
        dataset: folder of the conversations.
        folder: new or there.

    Raises:
        ValueError: a model does not load.
    """
    folder.mkdir(exist_ok=True)
    probes = make_probes(base, model, dataset)
    (folder / FILE).write_text(probes.model_dump_json(), encoding="utf-8")
    return folder


def make_probes(base: Path, model: Path, dataset: Path) -> ServingProbes:
    """Return what `record_answers` writes."""
    device = choose_device()
    dtype = choose_reference_dtype(model, device)
    loaded = load_model(model, dtype=dtype, device=device)
    tokenizer: Any = load_tokenizer(model)
    longest = min(LONGEST.get(device.type, LONGEST["cpu"]), context_length(loaded) - NUM_TOKENS - 8)
    questions = choose_questions(tokenizer, load_settings(model, tokenizer), dataset, longest=longest)
    prompts = [question.prompt for question in questions]
    stop_ids = find_stop_ids((loaded.generation_config, _shipped(model)), tokenizer)
    answers = _answer(loaded, prompts, stop_ids)
    rounding = None
    if loaded.dtype not in _16_BIT:
        halved: Any = loaded
        rounding = _measure_rounding(halved.to(torch.bfloat16), prompts, answers)
    stored = _read_stored(model)
    computed = str(dtype or stored).removeprefix("torch.")
    del loaded
    _free(device)
    bases = _answer_base(base, prompts, stop_ids, dtype, device)
    probes = tuple(
        ServingProbe(
            name=question.name,
            messages=question.messages,
            tools=question.tools,
            prompt=tuple(question.prompt),
            answer=answer,
            base=other,
        )
        for question, answer, other in zip(questions, answers, bases, strict=True)
    )
    return ServingProbes(
        probes=probes, texts=_spell(tokenizer, probes), stored=stored, computed=computed, rounding=rounding
    )


def choose_reference_dtype(model: Path, device: torch.device) -> torch.dtype | None:
    """Return fp32, or None (the stored dtype) when fp32 weights would not fit on the GPU."""
    num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    if device.type == "cuda" and 2.5 * num_bytes > torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.float32


def _read_stored(model: Path) -> str:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")


def _shipped(model: Path) -> GenerationConfig | None:
    exists = (model / "generation_config.json").exists()
    return GenerationConfig.from_pretrained(str(model), local_files_only=True) if exists else None


def _answer(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: frozenset[int], num_tokens: int = NUM_TOKENS
) -> list[RecordedAnswer]:
    """Answer greedily, and read the most likely tokens at each position of the answers."""
    if not prompts:
        return []
    # Few at once on a CPU: they are padded to the longest of them.
    size: Any = 3 if model.device.type == "cpu" else "auto"
    said = generate_greedy(model, prompts, stop_ids=stop_ids, max_new_tokens=num_tokens, batch_size=size)
    alternatives = _read_alternatives(model, prompts, said)
    return [
        RecordedAnswer(tokens=tuple(tokens), ended=len(tokens) < num_tokens, alternatives=tuple(found))
        for tokens, found in zip(said, alternatives, strict=True)
    ]


@torch.inference_mode()
def _read_alternatives(
    model: PreTrainedModel, prompts: list[list[int]], said: Sequence[Sequence[int]]
) -> list[list[Alternatives]]:
    """Return the most likely tokens before each token of the answers, row by row: padding would change the numbers."""
    found: list[list[Alternatives]] = []
    for prompt, tokens in zip(prompts, said, strict=True):
        if not tokens:
            found.append([])
            continue
        input_ids, mask, positions = pad_left([[*prompt, *tokens[:-1]]], model.device)
        logits: Tensor = forward(model, input_ids, mask, positions, cache=None, use_cache=False, keep=len(tokens))[0][0]
        values, ids = torch.log_softmax(logits.float(), dim=-1).topk(NUM_ALTERNATIVES)
        rows = zip(ids.tolist(), values.tolist(), strict=True)
        found.append([tuple(zip(tokens_, values_, strict=True)) for tokens_, values_ in rows])
    return found


def _measure_rounding(model: PreTrainedModel, prompts: list[list[int]], answers: Sequence[RecordedAnswer]) -> float:
    """Return the mean difference that a model in 16 bits makes, on all but the longest prompt, which takes longest."""
    longest = max(map(len, prompts), default=0)
    chosen = [(p, a) for p, a in zip(prompts, answers, strict=True) if len(p) < longest or len(prompts) == 1]
    rounded = _read_alternatives(model, [prompt for prompt, _ in chosen], [list(a.tokens) for _, a in chosen])
    return _mean_difference([answer.alternatives for _, answer in chosen], rounded)


def _answer_base(
    base: Path, prompts: list[list[int]], stop_ids: frozenset[int], dtype: torch.dtype | None, device: torch.device
) -> list[RecordedAnswer] | list[None]:
    model = load_model(base, dtype=dtype, device=device)
    embeddings: Any = model.get_input_embeddings()
    known = max((max(prompt) for prompt in prompts), default=0) < embeddings.weight.shape[0]
    # Its first token is enough to know it by.
    answers = _answer(model, prompts, stop_ids, 1) if known else [None] * len(prompts)
    del model
    _free(device)
    return answers


def _mean_difference(one: Sequence[Sequence[Alternatives]], other: Sequence[Sequence[Alternatives]]) -> float:
    """Return the mean absolute difference of what both name among the most likely tokens, in nats."""
    differences = [
        abs(logprob - found[token])
        for row, theirs in zip(one, other, strict=True)
        for alternatives, others in zip(row, theirs, strict=True)
        for found in [dict(others)]
        for token, logprob in alternatives
        if token in found
    ]
    return sum(differences) / max(len(differences), 1)


def _spell(tokenizer: Any, probes: Sequence[ServingProbe]) -> dict[int, str]:
    answers = [answer for probe in probes for answer in (probe.answer, probe.base) if answer is not None]
    ids = {token for answer in answers for token in answer.tokens}
    ids |= {token for answer in answers for row in answer.alternatives for token, _ in row}
    return {
        token: str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for token in sorted(ids)
    }


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
