"""The demo's model in other widths, and its examples, for the plan's benchmark on a CPU."""

import json
import shutil
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
_NUM_HELD_OUT = 40


def make_demo_model(folder: Path, *, width: int) -> None:
    """Save the demo's model, or one of random weights with another hidden size, a multiple of 64; 0: as it is."""
    if (folder / "config.json").is_file():
        return
    if not width:
        shutil.copytree(DEMO / "base_model", folder)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(DEMO / "base_model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    factor = width / values["hidden_size"]
    values["hidden_size"] = width
    values["intermediate_size"] = int(values["intermediate_size"] * factor)
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def make_demo_tokens(folder: Path, *, longest: int) -> None:
    """Make the demo's examples; those of more than `longest` tokens are left out, 0 for none; 40 are held out."""
    if (folder / "train.parquet").is_file():
        return
    import polars as pl

    from schemas.loading import load_config
    from tasks.ingestion.dataset import build_dataset
    from tasks.tokenization.examples import tokenize_dataset
    from tasks.tokenization.templates import prepare_tokenizer

    config = load_config(DEMO.parent / "configs" / "demo.yaml")
    made = folder.with_name(f"{folder.name}-made")
    shutil.rmtree(made, ignore_errors=True)
    build_dataset(config.read_data, seed=config.seed, folder=made / "dataset")
    prepared = prepare_tokenizer(DEMO / "base_model", config.model.chat_template, {})
    tokenize_dataset(made / "dataset", prepared, made / "tokens", config.tokenization)
    folder.mkdir(parents=True)
    for name, most in (("train.parquet", None), ("eval.parquet", _NUM_HELD_OUT)):
        table = pl.read_parquet(made / "tokens" / name, n_rows=most)
        if longest:
            table = table.filter(pl.col("input_ids").list.len() <= longest)
        table.write_parquet(folder / name)
    shutil.rmtree(made)
