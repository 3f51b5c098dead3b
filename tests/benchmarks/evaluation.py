"""Speed of the evaluation on a GPU, and whether its answers are those of transformers' own `generate`.

    python tests/benchmarks/evaluation.py [--rows 256] [--alone-seconds 12] [--generate-batch] [--profile]

A model of the Qwen3-0.6B shape with random weights answers prompts with 128 tokens each (nothing stops it). Against it:
`generate` on one row after the other, for as long as --alone-seconds says and extrapolated from the rows it got
through; and batches of 16 rows padded on the left. In fp32, without TF32, the tokens must be the same: compared with
`generate` for the rows that it did, and for every row with the model's own forward pass over the row alone, without a
cache, where each token has to be the likeliest one. The last line is one JSON object.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tasks.evaluation.generation import decode_in_batches, generate_greedy, ignore_progress
from tasks.evaluation.likelihood import score_in_batches, score_targets
from tasks.evaluation.slots import Prompt

SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
    "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}  # fmt: skip
SMALL_SHAPE: dict[str, Any] = {
    **SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 1000,
}  # fmt: skip
NEW_TOKENS = 128
WANTED = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--alone-seconds", type=float, default=12.0, help="for `generate`, per precision")
    parser.add_argument("--generate-batch", action="store_true", help="time transformers' generate_batch as well")
    parser.add_argument("--profile", action="store_true", help="show where the time of the answers goes (bf16)")
    parser.add_argument("--small", action="store_true", help="a toy shape, to try the script out on a CPU")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    started = time.perf_counter()
    shape = SMALL_SHAPE if options.small else SHAPE
    rows = draw_rows(options.rows, vocabulary=shape["vocab_size"])
    results: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build(shape, dtype)
        name = str(dtype).removeprefix("torch.")
        results[name] = measure(model, rows, options, exact=dtype == torch.float32)
        del model
        release()
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results["torch"] = torch.__version__
    met = [results[name]["answers"]["ratio"] >= WANTED for name in ("float32", "bfloat16")]
    results["met"] = all(met) and results["float32"]["answers"]["explained_share"] == 1.0
    print(json.dumps(results))


def build(shape: dict[str, Any], dtype: torch.dtype) -> Any:
    """Make a model with random weights, the same for every precision but for their rounding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", **shape, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():
            # Wider than a fresh model's: what comes next shall depend on what was before.
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.04)
    return model.to(dtype).eval()


def draw_rows(count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Draw prompts and answers: lengths lognormal, medians 60 and 180, sigmas 0.8 and 0.9."""
    generator = torch.Generator().manual_seed(0)

    def draw_lengths(median: float, sigma: float, least: int, most: int) -> list[int]:
        normal = torch.randn(count, generator=generator)
        return (math.log(median) + sigma * normal).exp().clamp(least, most).int().tolist()

    lengths = zip(draw_lengths(60, 0.8, 8, 1024), draw_lengths(180, 0.9, 4, 1024), strict=True)
    return [
        tuple(torch.randint(10, vocabulary, (length,), generator=generator).tolist() for length in pair)  # type: ignore[misc]
        for pair in lengths
    ]


def measure(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], options: argparse.Namespace, *, exact: bool
) -> dict[str, Any]:
    """Time answers and likelihoods in one precision."""
    prompts, targets = [prompt for prompt, _ in rows], [target for _, target in rows]
    print(f"--- {model.dtype}: {len(rows)} prompts of {sum(map(len, prompts)) / len(rows):.0f} tokens on average")
    return {
        "answers": measure_answers(model, prompts, options, exact=exact),
        "nll": measure_likelihood(model, prompts, targets, exact=exact),
    }


def measure_answers(
    model: Any, prompts: list[list[int]], options: argparse.Namespace, *, exact: bool
) -> dict[str, Any]:
    """Time the answers, and compare them with those of each row alone."""
    ask = partial(generate_greedy, model, prompts, stop_ids=frozenset(), max_new_tokens=NEW_TOKENS)
    peak = PeakMemory()
    first_seconds, answers = clock(ask)
    seconds, again = clock(ask)
    peak_gib = peak.read()
    reused_seconds, reused = clock(partial(ask, batch_size=64))
    assert [len(answer) for answer in answers] == [NEW_TOKENS] * len(prompts)
    alone, alone_seconds = answer_alone(model, prompts, options.alone_seconds)
    padded_seconds, padded = time_padded(model, prompts[:32])
    rate, alone_rate = len(prompts) / seconds, len(alone) / alone_seconds
    result = {
        "rows_per_second": round(rate, 2),
        "tokens_per_second": round(rate * NEW_TOKENS),
        "first_call_rows_per_second": round(len(prompts) / first_seconds, 2),
        "64_slots_rows_per_second": round(len(prompts) / reused_seconds, 2),
        "peak_gib": peak_gib,
        "alone_rows": len(alone),
        "alone_rows_per_second": round(alone_rate, 3),
        "ratio": round(rate / alone_rate, 1),
        "padded_16_rows_per_second": round(32 / padded_seconds, 2),
        "equal_to_alone": share([answers[row] == tokens for row, tokens in alone.items()]),
        "equal_64_slots": share([one == other for one, other in zip(answers, reused, strict=True)]),
        "equal_second_call": share([one == other for one, other in zip(answers, again, strict=True)]),
        "equal_padded_16": share([one == other for one, other in zip(answers, padded, strict=False)]),
        "explained_share": None,
    }
    if exact:
        gaps = [
            gap for prompt, answer in zip(prompts, answers, strict=True) for gap in find_gaps(model, prompt, answer)
        ]
        result["rows_not_likeliest"] = len(gaps)
        result["largest_gap"] = max(gaps, default=0.0)
        # A token that is not the likeliest by less than fp32 can tell: a tie that each way breaks in its own manner.
        result["explained_share"] = 1.0 - sum(gap > 1e-4 for gap in gaps) / len(prompts)
        result["distinct_tokens"] = round(sum(len(set(answer)) for answer in answers) / len(answers), 1)
    print(f"answers: {rate:8.2f} rows/s ({result['tokens_per_second']:,} tokens/s), {first_seconds:.2f} s the first "
          f"time, {seconds:.2f} s the second; alone {alone_rate:.3f} rows/s from {len(alone)} rows, extrapolated to "
          f"{len(prompts) / alone_rate:.0f} s: {result['ratio']:g} x (wanted {WANTED:g})")  # fmt: skip
    print(f"         {json.dumps(result)}", flush=True)
    if options.generate_batch:
        result["generate_batch_rows_per_second"] = time_generate_batch(model, prompts)
    if options.profile and not exact:
        profile(ask)
    return result


def answer_alone(model: Any, prompts: list[list[int]], budget: float) -> tuple[dict[int, list[int]], float]:
    """Let `generate` answer one row at a time, in a drawn order, until the time is up; the first one warms up."""
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(1)).tolist()
    generate_alone(model, prompts[order[0]], 16)
    answers: dict[int, list[int]] = {}
    started = time.perf_counter()
    for row in order:
        answers[row] = generate_alone(model, prompts[row], NEW_TOKENS)
        if time.perf_counter() - started > budget:
            break
    return answers, time.perf_counter() - started


def generate_alone(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Answer one prompt by `generate`."""
    input_ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(input_ids)
    output = model.generate(input_ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def time_padded(model: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Answer in padded batches of 16."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    waiting = [Prompt(row, prompts[row], NEW_TOKENS) for row in order]
    answers: dict[int, list[int]] = {}
    seconds, _ = clock(partial(decode_in_batches, model, waiting, answers, frozenset(), ignore_progress, 16))
    return seconds, [answers[row] for row in range(len(prompts))]


@torch.inference_mode()
def find_gaps(model: Any, prompt: list[int], answer: list[int]) -> list[float]:
    """Return by how much the first token that is not the likeliest falls short of it; nothing where there is none."""
    logits = model(input_ids=torch.tensor([prompt + answer], device=model.device), use_cache=False).logits[0]
    logits = logits[len(prompt) - 1 : -1].float()
    given = logits.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
    gaps = logits.amax(dim=-1) - given
    wrong = gaps.nonzero()
    return [float(gaps[wrong[0, 0]])] if len(wrong) else []


def time_generate_batch(model: Any, prompts: list[list[int]]) -> Any:
    """Let transformers' continuous batching answer all; say what stands in the way where it does not."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    before = model.config._attn_implementation
    try:
        seconds, outputs = clock(lambda: model.generate_batch(inputs=prompts, generation_config=config))
        num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
        print(f"generate_batch: {num_tokens} tokens in {seconds:.1f} s", flush=True)
        return round(num_tokens / NEW_TOKENS / seconds, 2)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        model.set_attn_implementation(before)


def measure_likelihood(
    model: Any, prompts: list[list[int]], targets: list[list[int]], *, exact: bool
) -> dict[str, Any]:
    """Time the scoring of targets in flat packs and in padded batches of 16."""
    num_tokens = sum(map(len, prompts)) + sum(map(len, targets))
    flat = partial(score_targets, model, prompts, targets)
    sums: dict[int, float] = {}
    clock(flat)
    seconds, found = clock(flat)
    # The padded way slices its logits finely: a quarter of the rows is enough to know its speed.
    some = len(prompts) // 4
    padded_seconds, _ = clock(
        partial(score_in_batches, model, prompts[:some], targets[:some], sums, 2**26, ignore_progress, 16)
    )
    num_padded_tokens = sum(map(len, prompts[:some])) + sum(map(len, targets[:some]))
    rate, padded_rate = num_tokens / seconds, num_padded_tokens / padded_seconds
    off = [abs(found[row] - value) / value for row, value in sums.items()]
    result = {
        "packed_tokens_per_second": round(rate),
        "padded_tokens_per_second": round(padded_rate),
        "ratio": round(rate / padded_rate, 2),
        "compared_rows": some,
        "largest_relative_difference": max(off),
        "nll": sum(found) / sum(map(len, targets)),
    }
    print(f"nll:     {json.dumps(result)}", flush=True)
    assert not exact or max(off) < 1e-5, "the packed sums are not the padded ones"
    return result


def profile(ask: Callable[[], Any]) -> None:
    """Print the kernels that take the most time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        ask()
        torch.cuda.synchronize()
    print(recorded.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=70))


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that a call took, and what it gave."""
    release()
    started = time.perf_counter()
    value = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, value


class PeakMemory:
    """The most memory that was allocated since it was made."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> float:
        return round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else 0.0


def share(values: list[bool]) -> str:
    return f"{sum(values)} of {len(values)}"


def release() -> None:
    import gc

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
