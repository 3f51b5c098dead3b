"""The proof of a merge: the model reloaded from disk against base + adapter, and against the base.

Where the model's own weights were trained, these stand in place of base + adapter.

Dimensions: `P` probes, `K` greedy tokens of a probe, `V` vocabulary.

Base + adapter continues each prompt greedily by K tokens. The merged model then reads the same prompt and tokens: at
each of the K positions its logits are compared, and whether it would have chosen the same token. When all agree, free
running would have agreed too; a single difference does not spoil the positions after it. One model is in memory at a
time.
"""

import gc
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig

from schemas.artifacts import MergeCheck
from schemas.config import MergeConfig
from tasks.merging.shards import FLOATS, read_headers
from tasks.merging.stored import unpack
from tasks.merging.trained_models import has_own_weights, load_trained
from tasks.models import choose_device, load_model

MAX_LOGIT_DIFF_FP32 = 1e-3
MAX_LOGIT_DIFF_16_BIT = 1.0
GROUP_TOKENS = 8192
"""Of the prompts that go through a model together; all models get them padded alike."""


class ParityError(ValueError):
    """The merged model is not base + adapter, or is no different from the base."""


@dataclass(frozen=True)
class ParityProbe:
    """What base + adapter, and the base alone, say after one prompt."""

    input_ids: list[int]
    """The prompt and all but the last greedy token."""
    adapted: Tensor
    """Logits [K, V] of base + adapter, fp32 on the CPU."""
    base: Tensor
    """Logits [K, V] of the base alone."""


def check_merge(
    base_model: Path, adapter: Path, merged: Path, prompts: list[list[int]], config: MergeConfig
) -> MergeCheck:
    """Compare the merged model on disk with base + adapter on prompts.

    Computes in fp32 where it fits, so that what is seen is the weights' rounding and not that of the arithmetic.

    Args:
        base_model: folder.
        adapter: folder in PEFT's format, or of trained weights.
        merged: folder of the merged model.
        prompts: token ids, each at least one.
        config: number of greedy tokens and the limits.

    Raises:
        ParityError: a limit does not hold, the merged model does not load, or it is no nearer to base + adapter than
            to the base.
    """
    prompts = [prompt for prompt in prompts if prompt][: config.num_probes]
    if not prompts:
        raise ParityError("no prompts to compare the merged model on: held-out examples are wanted")
    device = choose_device()
    dtype = _choose_compute_dtype(base_model, device)
    probes = _probe_adapted(base_model, adapter, prompts, config.probe_tokens, device, dtype)
    _free(device)
    try:
        model: Any = load_model(merged, dtype=dtype, device=device)
        logits = _read_logits(model, [probe.input_ids for probe in probes], config.probe_tokens)
    except Exception as error:
        raise ParityError(f"{merged}: the merged model does not load from disk: {error}") from error
    del model
    _free(device)
    check = _compare(probes, logits)
    _enforce(check, config, merged, "the trained model" if has_own_weights(adapter) else "base + adapter")
    return check


def _choose_compute_dtype(base_model: Path, device: torch.device) -> torch.dtype | None:
    """Return fp32, or None (the stored dtype) when fp32 weights would not fit on the GPU."""
    num_values = sum(torch.Size(tensor.shape).numel() for tensor in unpack(read_headers(base_model)).values())
    if device.type == "cuda" and 5 * num_values > torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.float32


def _probe_adapted(
    base_model: Path,
    adapter: Path,
    prompts: list[list[int]],
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[ParityProbe]:
    """Continue each prompt greedily with base + adapter, and read both sets of logits there."""
    model = load_trained(base_model, adapter, dtype=dtype, device=device)
    longest = getattr(_unwrap(model).config.get_text_config(), "max_position_embeddings", None)
    starts = [prompt[-(longest - num_tokens) :] if longest else prompt for prompt in prompts]
    greedy = [tokens for rows in _group(starts) for tokens in _continue_greedily(model, rows, num_tokens)]
    input_ids = [start + tokens[:-1] for start, tokens in zip(starts, greedy, strict=True)]
    adapted = _read_logits(model, input_ids, num_tokens)
    if has_own_weights(adapter):
        del model
        _free(device)
        alone = _read_logits(load_model(base_model, dtype=dtype, device=device), input_ids, num_tokens)
    else:
        with model.disable_adapter():
            alone = _read_logits(model, input_ids, num_tokens)
    return [ParityProbe(*values) for values in zip(input_ids, adapted, alone, strict=True)]


@torch.no_grad()
def _continue_greedily(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Return the most probable next tokens of each prompt; an end of turn does not stop it."""
    padded = _pad_left(prompts, model.device)
    config = GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    try:
        output: Tensor = model.generate(**padded, generation_config=config)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # of a family whose cache does not serve
        config.use_cache = False
        output = model.generate(**padded, generation_config=config)
    tokens: list[list[int]] = output[:, -num_tokens:].tolist()
    return tokens


@torch.no_grad()
def _read_logits(model: Any, rows: list[list[int]], num_positions: int) -> list[Tensor]:
    """Return the logits of the last positions of each row, [K, V] in fp32 on the CPU."""
    takes_positions = "position_ids" in signature(_unwrap(model).forward).parameters
    results: list[Tensor] = []
    for group in _group(rows):
        padded = _pad_left(group, model.device)
        if takes_positions and "attention_mask" in padded:
            padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = model(**padded, use_cache=False, logits_to_keep=num_positions).logits
        results.extend(logits[:, -num_positions:].float().cpu())
    return results


def _unwrap(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _group(rows: list[list[int]]) -> list[list[list[int]]]:
    """Cut rows into groups of at most `GROUP_TOKENS` padded tokens, in their order: a launch a row takes far longer."""
    groups: list[list[list[int]]] = []
    for row in rows:
        together = [*groups[-1], row] if groups else []
        if together and len(together) * max(map(len, together)) <= GROUP_TOKENS:
            groups[-1] = together
        else:
            groups.append([row])
    return groups


def _pad_left(rows: list[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Return rows side by side, ending together, and where they begin; rows of one length need no mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=device)
    if all(len(row) == length for row in rows):
        return {"input_ids": ids}
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _compare(probes: list[ParityProbe], logits: list[Tensor]) -> MergeCheck:
    """Measure the largest logit difference and the agreement, and say which of both models the merged one is."""
    largest, num_same, num_tokens = 0.0, 0, 0
    from_adapted, from_base = 0.0, 0.0
    for probe, merged in zip(probes, logits, strict=True):
        difference = (merged - probe.adapted).abs()
        # max() of Python would drop a NaN that comes second.
        largest = float(torch.stack([difference.max(), torch.tensor(largest)]).max())
        num_same += int((merged.argmax(dim=-1) == probe.adapted.argmax(dim=-1)).sum())
        num_tokens += len(probe.adapted)
        from_adapted += float(difference.double().mean())
        from_base += float((merged - probe.base).abs().double().mean())
    return MergeCheck(
        max_abs_logit_diff=largest,
        greedy_agreement=num_same / num_tokens,
        differs_from_base=from_base > from_adapted,
    )


def _enforce(check: MergeCheck, config: MergeConfig, merged: Path, trained: str) -> None:
    """Raise ParityError naming each limit that does not hold."""
    sizes: dict[str, int] = {}
    for tensor in read_headers(merged).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    stored = max(sizes, key=lambda dtype: sizes[dtype])
    default = MAX_LOGIT_DIFF_FP32 if FLOATS.get(stored) in (torch.float32, torch.float64) else MAX_LOGIT_DIFF_16_BIT
    limit = config.max_logit_diff or default
    problems = []
    if not check.max_abs_logit_diff <= limit:
        problems.append(
            f"the largest logit difference from {trained} is {check.max_abs_logit_diff:.3g}, above {limit:g} "
            f"({stored} weights; merge.max_logit_diff)"
        )
    if not check.greedy_agreement >= config.min_greedy_agreement:
        problems.append(
            f"only {check.greedy_agreement:.1%} of the greedy tokens are those of {trained}, below "
            f"{config.min_greedy_agreement:.1%} (merge.min_greedy_agreement)"
        )
    if not check.differs_from_base:
        problems.append(
            f"it is as near to the base model as to {trained}: the training changed nothing, or less than "
            f"{stored} can hold: train longer or with a higher learning rate"
        )
    if problems:
        raise ParityError(f"{merged}: the merged model does not hold: " + "; ".join(problems))


def _free(device: torch.device) -> None:
    """Give the memory of models that went out of scope back to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
