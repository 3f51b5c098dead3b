"""Build the demo's base model and dataset from the seed: `python -m deploy.demo.build`.

The dataset, the corpus and the tokenizer come out byte for byte the same on every machine. The weights depend on the
machine's arithmetic in their last digits, and so differ a little from one machine to another. What it takes is in
README.md beside this file.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch

from deploy.demo.corpus import digest_documents, make_documents
from deploy.demo.pretraining import Recipe, pretrain
from deploy.demo.rows import write_rows
from deploy.demo.vocabulary import train_tokenizer
from deploy.demo.world import SEED

FOLDER = Path(__file__).parent


def build_dataset(folder: Path) -> None:
    """Write the dataset below the folder."""
    num_train, num_held_out = write_rows(folder / "data")
    print(f"{folder / 'data'}: {num_train} training rows, {num_held_out} held-out rows")


def build_base_model(folder: Path, recipe: Recipe, device: torch.device) -> None:
    """Pretrain the base model, and write it and the record of its making below the folder."""
    documents = make_documents()
    print(f"{len(documents)} documents, sha256 {digest_documents(documents)}")
    tokenizer = train_tokenizer(documents)
    losses: list[float] = []

    def on_step(step: int, loss: float, seconds: float) -> None:
        losses.append(loss)
        print(f"step {step:6d} of {recipe.steps}  loss {loss:.3f}  {seconds:7.1f} s", flush=True)

    started = time.perf_counter()
    model = pretrain(documents, tokenizer, recipe, seed=SEED, device=device, on_step=on_step)
    seconds = time.perf_counter() - started
    target = folder / "base_model"
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    record = {
        "seed": SEED,
        "corpus": {
            "sha256": digest_documents(documents),
            "num_documents": len(documents),
            "num_bytes": sum(len(document.encode()) for document in documents),
        },
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "recipe": asdict(recipe),
        "final_loss": round(losses[-1], 4),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    (folder / "build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{target}: {record['num_parameters']} parameters after {seconds:.0f} s")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: beside this file)")
    parser.add_argument("--dataset-only", action="store_true", help="write the dataset and leave the base model")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="pretraining steps (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    build_dataset(arguments.folder)
    if not arguments.dataset_only:
        build_base_model(arguments.folder, Recipe(steps=arguments.steps), torch.device(arguments.device))


if __name__ == "__main__":
    main()
