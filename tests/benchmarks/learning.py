"""What FP8 and 4-bit frozen weights cost in learning: the held-out loss beside that of the bf16 base.

    python tests/benchmarks/learning.py --tokenizer FOLDER --pretrain FILE … --tune FILE --work /tmp/learning

A decoder is pretrained on the texts of some files for a minute and saved in bf16; the training stage's own function
then fine-tunes a LoRA adapter on the conversations of another file, once for each kind of frozen weights: the same
start, the same rows in the same order, the same steps. Two held-out losses count: the one during training, on the
weights that it trains on, and that of the finished adapter on the full bf16 weights, which is what the merged model
has. Files hold JSON rows of instruction, input and response (or output), or of messages. The last line is a JSON
object.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
WINDOW = 512
NUM_EVALS = 12
# The largest difference from bf16 that is wanted, relative.
LIMIT = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--pretrain", type=Path, nargs="+", required=True, help="files of texts")
    parser.add_argument("--tune", type=Path, required=True, help="file of conversations")
    parser.add_argument("--work", type=Path, default=Path("/tmp/sft-learning"))
    parser.add_argument("--kinds", nargs="+", default=["full", "fp8", "nf4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of pretraining")
    parser.add_argument("--pretrain-steps", type=int, default=100_000, help="at most")
    parser.add_argument("--windows", type=int, default=64, help=f"of {WINDOW} tokens, a pretraining step")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--held-out", type=int, default=200, help="rows")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    model = pretrain(options)
    counts = write_tokens(options)
    untrained = measure(options, None)
    runs = {f"{kind}-{seed}": tune(options, kind, seed) for seed in options.seeds for kind in options.kinds}
    report(options, {"model": model, "tokens": counts, "untrained_nll": untrained, "runs": runs})


def pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Train a Llama-shaped model on random windows of the texts until the time is over, and save it in bf16."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(options.tokenizer))
    texts = ["\n".join(part for part in turn if part) for file in options.pretrain for turn in read_turns(file)]
    lists = tokenizer(texts, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for ids in lists for token in [*ids, tokenizer.eos_token_id]], device=device)
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 128) * 128, hidden_size=options.hidden, num_hidden_layers=options.layers,
        intermediate_size=-(-options.hidden * 8 // 3 // 128) * 128, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3), tie_word_embeddings=True, max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator(device).manual_seed(0)
    steps, losses, started = 0, [], time.perf_counter()
    done = 0.0
    while done < 1.0:
        for group in optimizer.param_groups:  # warm-up over a twentieth, then a cosine to a tenth of the peak
            group["lr"] = 1e-3 * min(1.0, 20 * done + 0.01) * (0.55 + 0.45 * math.cos(math.pi * done))
        begins = torch.randint(len(stream) - WINDOW, (options.windows, 1), device=device, generator=generator)
        ids = stream[begins + torch.arange(WINDOW, device=device)]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        losses.append(float(loss.detach()))
        done = max((time.perf_counter() - started) / options.seconds, steps / options.pretrain_steps)
        if steps == 1 or steps % 100 == 0:
            print(f"pretraining step {steps}: loss {losses[-1]:.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(options.work / "model")
    tokenizer.save_pretrained(options.work / "model")
    last = losses[-max(1, steps // 20) :]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "in_linear_layers": sum(p.numel() for name, p in model.named_parameters() if "_proj" in name),
        "stream_tokens": len(stream),
        "pretraining_steps": steps,
        "pretraining_tokens": steps * options.windows * WINDOW,
        "pretraining_loss": round(sum(last) / len(last), 4),
        "pretraining_seconds": round(time.perf_counter() - started, 1),
    }


def read_turns(file: Path) -> list[list[str]]:
    """Return what was said in each row of a file, the user's words first."""
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    turns = []
    for row in rows:
        if "messages" in row:
            turns.append([message["content"] for message in row["messages"] if message["role"] != "system"])
        else:
            question = f"{row['instruction']}\n{row.get('input') or ''}".strip()
            turns.append([question, (row.get("response") or row.get("output") or "").strip()])
    return [turn for turn in turns if len(turn) >= 2 and turn[1]]


def write_tokens(options: argparse.Namespace) -> dict[str, int]:
    """Mask and tokenize the conversations as the tokenization stage does; the last rows are held out."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    from schemas.config import TokenizationConfig
    from tasks.tokenization.masking import build_examples
    from tasks.tokenization.templates import prepare_tokenizer

    tokenizer = prepare_tokenizer(options.tokenizer, None).tokenizer
    config = TokenizationConfig(max_length=1024)
    examples = []
    for turn in read_turns(options.tune):
        roles = ("user", "assistant")
        messages = [{"role": roles[number % 2], "content": words} for number, words in enumerate(turn)]
        try:
            examples.extend(build_examples(messages, tokenizer, config=config))
        except ValueError as error:
            print("left out:", error)
    folder = options.work / "tokens"
    folder.mkdir()
    parts = {"train": examples[: -options.held_out], "eval": examples[-options.held_out :]}
    lists = pa.list_(pa.int32())
    for name, part in parts.items():
        columns = {
            "example_id": [f"{name} {number}" for number in range(len(part))],
            "input_ids": pa.array([example.input_ids for example in part], lists),
            "labels": pa.array([example.labels for example in part], lists),
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return {name: sum(len(example.input_ids) for example in part) for name, part in parts.items()}


def tune(options: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """Fine-tune on one kind of frozen weights; return the curve, and the loss of the adapter on the full weights."""
    import gc

    import torch

    from schemas.config import TrainingConfig
    from tasks.training.loop import train_adapter

    config = TrainingConfig(
        base_weights=kind,
        max_steps=options.steps,
        num_epochs=1000,
        learning_rate=2e-4,
        eval_every_steps=math.ceil(options.steps / NUM_EVALS),
        checkpoint_every_steps=100_000,
    )
    curve: list[tuple[int, float]] = []
    started = time.perf_counter()

    def note(record: Any) -> None:
        curve.append((record.step, record.loss))
        print(f"{kind} seed {seed}: step {record.step}: held-out nll {record.loss:.4f}", flush=True)

    run = options.work / f"{kind}-{seed}"
    model, tokens = options.work / "model", options.work / "tokens"
    try:
        outcome = train_adapter(model, tokens, run, config, seed=seed, identity=f"{kind}-{seed}", on_eval=note)
    except ValueError as error:
        print(f"{kind}: {error}", flush=True)
        return {"error": str(error)}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    seconds = time.perf_counter() - started
    return {
        "curve": curve,
        "nll": curve[-1][1],
        "nll_on_full_weights": measure(options, outcome.adapter),
        "final_training_loss": outcome.final_loss,
        "tokens_per_second": round(outcome.tokens_per_second),
        "peak_gib": round(outcome.peak_memory_bytes / 2**30, 2),
        "seconds": round(seconds, 1),
        "warnings": list(outcome.warnings),
    }


def measure(options: argparse.Namespace, adapter: Path | None) -> float:
    """Return the held-out loss of the full bf16 base, with an adapter or without, by the model's own forward pass."""
    import torch
    from peft import PeftModel

    from schemas.config import TrainingConfig
    from tasks.models import choose_device, load_model
    from tasks.training.engines.general import build_engine
    from tasks.training.objective import SFT
    from tasks.training.rows import lay_out, open_rows
    from tasks.training.validation import sum_held_out

    device = choose_device()
    model: Any = load_model(options.work / "model", dtype=torch.bfloat16, device=device)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    engine = build_engine(model, device=device, dtype=torch.bfloat16, micro_batch=16, tokens_per_forward=1 << 16)
    lay_out(options.work / "tokens" / "eval.parquet", options.work / "eval", TrainingConfig())
    loss_sum, num_trained = sum_held_out(model, engine, open_rows(options.work / "eval")[0], SFT)
    return float(loss_sum / num_trained)


def report(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Print the curves side by side and the differences from bf16; write them, with a plot where that can be made."""
    runs = {name: run for name, run in result["runs"].items() if "curve" in run}
    print(f"\nheld-out nll (nats a token); before training {result['untrained_nll']:.4f}")
    print(f"{'step':>16}" + "".join(f"{name:>12}" for name in runs))
    for points in zip(*(run["curve"] for run in runs.values()), strict=True):
        print(f"{points[0][0]:>16}" + "".join(f"{loss:>12.4f}" for _, loss in points))
    print(f"{'on full weights':>16}" + "".join(f"{run['nll_on_full_weights']:>12.4f}" for run in runs.values()))
    differences: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        kind, seed = name.rsplit("-", 1)
        full = runs.get(f"full-{seed}")
        if kind != "full" and full is not None:
            differences[name] = {key: run[key] / full[key] - 1 for key in ("nll", "nll_on_full_weights")}
            shown = ", ".join(f"{key} {value:+.2%}" for key, value in differences[name].items())
            print(f"{name} against full-{seed}: {shown} (wanted within {LIMIT:.0%})")
    met = bool(differences) and all(abs(value) <= LIMIT for pair in differences.values() for value in pair.values())
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"device": device, "torch": torch.__version__, **result, "difference_from_full": differences, "met": met}
    (options.work / "learning.json").write_text(json.dumps(result, indent=1))
    plot(runs, options.work / "learning.png")
    print(json.dumps(result))


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the curves where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, run in runs.items():
        axes.plot(*zip(*run["curve"], strict=True), marker=".", label=name)
    axes.set(xlabel="step", ylabel="held-out nll (nats a token)")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
