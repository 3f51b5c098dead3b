"""What a whole job starts from: rows of instruction data, a tokenizer with a chat template, a model of random weights.

Speed does not depend on the weights' values, but it does on lengths: rows that are made have those of
`trainers.draw_lengths`, counted by the tokenizer.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.benchmarks import trainers

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 0,
    },
}  # fmt: skip
_MERGES = 8000
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (  # noqa: SIM905 (a list of them would fill a page)
    "a about after again all also always an and another answer any are around as ask at away back be because been "
    "before begin below between book both bridge but by call can change city close color come could country cut day "
    "did different do does down draw each early earth eat end enough even every example eye family far farm father "
    "feel few find first follow food for form found four from garden get give go good great group grow had hand "
    "hard has have he head help her here high him his home house how idea if important in into is it its just keep "
    "kind know land language large last later learn leave left letter life light like line list little live long "
    "look made make man many market may me mean measure might mile more morning most mother mountain move much "
    "music must my name near need never new next night no not number of off often old on once one only open or "
    "other our out over own page paper part people picture place plan plant play point question quick rain read "
    "right river road rock room run said same say school sea second see seem sentence set she ship should show side "
    "simple small so some something song soon sound spell stand start state still stop story study such take talk "
    "teach tell than that the their them then there these they thing think this those thought three through time to "
    "together too town travel tree try turn two under until up us use very voice walk want was watch water way we "
    "well were what when where which while white who why will wind winter with without wood word work world would "
    "write year you young"
).split()
Row = dict[str, str]


class RowError(ValueError):
    """A row of the data has none of the known forms."""


def make_rows(num_rows: int, tokenizer: Any | None, most: int = 2048) -> list[Row]:
    """Make rows of the drawn lengths.

    Args:
        num_rows: at least one.
        tokenizer: counts the tokens of a word; without one, a word is a token.
        most: tokens of an example; longer ones of the drawn lengths are made shorter.
    """
    draw = random.Random(0)
    costs = {word: len(tokenizer.encode(f" {word}", add_special_tokens=False)) if tokenizer else 1 for word in _WORDS}
    lengths = trainers.draw_lengths()

    def write(num_tokens: int) -> str:
        words: list[str] = []
        while num_tokens > 0:
            words.append(draw.choice(_WORDS))
            num_tokens -= costs[words[-1]]
        return " ".join(words)

    rows = []
    for number in range(num_rows):
        prompt, answer = lengths[number % len(lengths)]
        prompt = min(prompt, most // 2)
        answer = min(answer, most - prompt)
        # The template's own words make a long example longer: without room for them the longest would be rejected.
        rows.append({"prompt": f"{number}: {write(max(1, prompt - 4))}", "completion": write(max(1, answer - 40))})
    return rows


def read_rows(paths: list[Path], num_rows: int | None) -> list[Row]:
    """Read rows of JSON or JSONL files, or of folders of them, each once, as prompt and completion.

    Raises:
        RowError: a row is neither prompt and completion, nor an instruction with its output, nor messages.
    """
    files = [
        found
        for path in paths
        for found in (sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if path.is_dir() else [path])
    ]
    rows: dict[str, Row] = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
        for number, value in enumerate(values, start=1):
            row = _read_row(value, f"{file}, row {number}")
            if row["prompt"].strip() and row["completion"].strip():
                rows.setdefault(json.dumps(row), row)
    found = list(rows.values())
    random.Random(0).shuffle(found)
    return found[:num_rows]


def _read_row(value: dict[str, Any], where: str) -> Row:
    """Return a row as prompt and completion; of messages, the last answer and what stands before it as one prompt."""
    if "instruction" in value:
        parts = [value["instruction"], value.get("input") or ""]
        answer = value.get("output") or value.get("response") or ""
        return {"prompt": "\n".join(filter(None, parts)), "completion": answer}
    for prompt, completion in (("prompt", "completion"), ("question", "answer")):
        if isinstance(value.get(prompt), str) and isinstance(value.get(completion), str):
            return {"prompt": value[prompt], "completion": value[completion]}
    if isinstance(value.get("messages"), list) and len(value["messages"]) >= 2:
        *before, last = value["messages"]
        return {"prompt": "\n".join(str(each["content"]) for each in before), "completion": str(last["content"])}
    raise RowError(
        f"{where}: has the keys {sorted(value)}: prompt and completion, question and answer, instruction and output, "
        "or messages are wanted"
    )


def write_rows(rows: list[Row], folder: Path, num_held_out: int) -> tuple[Path, Path]:
    """Write the rows as two JSONL files, for training and held out; return both."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows[:-num_held_out], "heldout": rows[-num_held_out:]}
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "train.jsonl", folder / "heldout.jsonl"


def make_model(folder: Path, shape: str, tokenizer: Path | None) -> Path:
    """Save a Qwen3 model of random weights in bf16 with a tokenizer, unless it is there.

    Args:
        folder: of the model.
        shape: a key of SHAPES; the vocabulary is at least the tokenizer's.
        tokenizer: a folder whose tokenizer is copied; None trains a byte-level BPE.
    """
    if (folder / "done").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        train_tokenizer(folder)
    else:
        for path in tokenizer.iterdir():
            if path.is_file() and path.suffix not in (".safetensors", ".bin") and path.name != "config.json":
                shutil.copyfile(path, folder / path.name)
    loaded = AutoTokenizer.from_pretrained(str(folder))
    settings = {**SHAPES[shape]}
    settings["vocab_size"] = max(settings["vocab_size"], -(-len(loaded) // 64) * 64)
    config = AutoConfig.for_model(
        "qwen3", **settings, tie_word_embeddings=True, max_position_embeddings=32768, dtype="bfloat16",
        eos_token_id=loaded.eos_token_id, pad_token_id=loaded.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    (folder / "done").touch()
    return folder


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on made rows, and save it with a chatml template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers import trainers as bpe
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = bpe.BpeTrainer(
        vocab_size=_MERGES, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator((f"{row['prompt']}\n{row['completion']}" for row in make_rows(500, None)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
