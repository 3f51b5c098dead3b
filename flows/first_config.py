"""`sft init`: a short commented config for a dataset and a model, from what is found in them."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.checking import Check, check_dataset
from schemas.config import DataConfig, ModelConfig, RunConfig, TokenizationConfig
from schemas.loading import ConfigError, apply_override, parse_config, quote_text
from schemas.plurals import count_of
from tasks.ingestion.errors import DataError
from tasks.models import read_context_length
from tasks.registry.bases import find_tokenizer_folder
from tasks.visible_text import make_visible

_FEWEST_HELD_OUT, _MOST_HELD_OUT = 30, 500
_HELD_OUT_PART = 0.1
_LONGEST = 131_072
_KEPT = ("to train", "held out")
# Answers that are short enough to be right or wrong as a whole.
_SHORT_ANSWER_TOKENS = 16
# Training rows up to which there are so many epochs.
_EPOCHS = ((5_000, 3), (50_000, 2))


@dataclass(frozen=True)
class FirstConfig:
    """A config, and what it was made of."""

    text: str
    """YAML with comments."""
    check: Check


def make_config(data: str, base_model: str, settings: Iterable[str] = ()) -> FirstConfig:
    """Return a config for a dataset and a model.

    Args:
        data: file, folder or hub name; of conversations, or of pairs of answers.
        base_model: folder, hub name or version of the registry.
        settings: `data.field=value`, by which the dataset is read; they stand in the config too.

    Raises:
        ValueError: the dataset or the tokenizer cannot be read, or a setting is wrong.
    """
    given = _read_settings(data, base_model, settings)
    model = ModelConfig(base_model=base_model)
    place = find_tokenizer_folder(model)
    context = (read_context_length(place) if (place / "config.json").is_file() else None) or _LONGEST
    length = TokenizationConfig(max_length=min(context, _LONGEST))
    found = _check(DataConfig.model_validate({"source": data, **given}), model, length)
    text = _write(data, base_model, context, found, given)
    parse_config(yaml.safe_load(text))
    return FirstConfig(text, found)


def _read_settings(data: str, base_model: str, settings: Iterable[str]) -> dict[str, Any]:
    """Return settings of the section data, by their names.

    Raises:
        ConfigError: one is of another section, unknown, or out of bounds.
    """
    values: dict[str, Any] = {"data": {}}
    for setting in settings:
        name = setting.partition("=")[0].strip()
        if not name.startswith("data.") or name == "data.source":
            raise ConfigError(
                f"--set {setting}: only settings of data change how the rows are read: write others into the config"
            )
        apply_override(values, setting)
    given: dict[str, Any] = dict(values["data"])
    whole = {"name": "init", "model": {"base_model": base_model}, "data": {"source": data, **given}}
    parse_config({**whole, "registry": {"name": "init"}}, "--set")
    return given


def _check(data: DataConfig, model: ModelConfig, length: TokenizationConfig) -> Check:
    """Check the rows as conversations; where they are none, as pairs of answers.

    Raises:
        ValueError: as `make_config`; of rows that are neither, what they lack to be conversations.
    """
    seed = RunConfig.model_fields["seed"].default
    try:
        return check_dataset(data, model, length, seed=seed)
    except DataError as error:
        try:
            return check_dataset(data.as_pairs(), model, length, seed=seed)
        except DataError:
            raise error from None


def choose_fraction(num_rows: int) -> float:
    """Return the part of the rows to hold out: enough for the gate where there are enough rows, and not many more."""
    fraction = min(_HELD_OUT_PART, _MOST_HELD_OUT / num_rows) if num_rows else _HELD_OUT_PART
    if num_rows * fraction < 1.2 * _FEWEST_HELD_OUT:  # some of them may be too long, or be rejected
        fraction = min(0.2, 1.2 * _FEWEST_HELD_OUT / max(num_rows, 1))
    return round(fraction, 4)


def choose_length(longest: int, context: int) -> int:
    """Return the smallest power of two that holds the longest example, or what the model has positions for."""
    return min(context, max(512, 1 << (longest - 1).bit_length()))


def _write(data: str, base_model: str, context: int, found: Check, given: Mapping[str, Any]) -> str:
    lengths, answers = found.masks["tokens_per_example"], found.masks["trained_tokens_per_example"]
    num_kept = found.rows["to train"] + found.rows["held out"]
    fraction = given.get("eval_fraction", choose_fraction(num_kept))
    num_held_out = round(num_kept * fraction)
    length = choose_length(int(lengths["max"]), context)
    epochs = next((count for most, count in _EPOCHS if num_kept <= most), 1)
    is_short = answers["p90"] <= _SHORT_ANSWER_TOKENS
    name = re.sub(r"[^a-z0-9.]+", "-", f"{Path(base_model).name}-{_shorten(data)}".lower()).strip("-.")
    is_paired = bool(found.masks["num_pairs"])
    metric, gain = ("exact_match", 0.02) if is_short else ("nll", 0.01)
    too_few = "" if num_held_out >= _FEWEST_HELD_OUT else ", too few for a champion (gate.min_conversations)"
    why = f"answers of {answers['median']:.0f} tokens are right or wrong as a whole" if is_short else "for free text"
    if is_paired:
        metric, gain, why = "reward_accuracy", 0.05, "part of the pairs whose chosen answer it prefers"
    objective = "objective: dpo             # pairs of answers: docs/preferences.md\n  " if is_paired else ""
    rate = "1.0e-5" if is_paired else "1.0e-4"
    longest = f"{lengths['max']:,}" + (": the model has positions for no more" if lengths["max"] >= context else "")
    shown = " ".join(make_visible(shlex.quote(data)).splitlines())
    more = "".join(
        f"  {name}: {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in given.items()
        if name != "eval_fraction"
    )
    return f"""# Made from {count_of(found.rows["rows in"], "row")}: {_list_rows(found)}.
# All settings and their meaning: docs/settings.md; how one row looks: sft check {shown} --config THIS_FILE
name: {name}

model:
  base_model: {quote_text(base_model)}

data:
  source: {quote_text(data)}
  eval_fraction: {fraction:<8}     # about {num_held_out:,} of them are held out{too_few}
{more}
tokenization:
  # Half of the examples have {lengths["median"]:.0f} tokens or fewer, the longest has {longest}.
  max_length: {length}

training:
  {objective}rank: 64
  alpha: 128
  learning_rate: {rate}
  num_epochs: {epochs:<10}     # fewer where there are more rows; an over-fitting model is told
  # dropout: 0.05            # LoRA's
  # packing: true            # packs of tokens in place of a number of examples a step

registry:
  name: {name}
  gate:
    metric: {metric:<15}  # {why}
    min_gain: {gain}
"""


def _shorten(data: str) -> str:
    """Return a dataset's own name: of an index of LLaMA-Factory's that of its entries, else the file's."""
    return data.partition("#")[2] or Path(data).stem


def _list_rows(found: Check) -> str:
    """Return where rows went; which of those that are kept will be held out, the config says."""
    rows = {name: count for name, count in found.rows.items() if count and name not in ("rows in", *_KEPT)}
    kept = f"{sum(found.rows[name] for name in _KEPT):,} to train on or hold out"
    others = [count_of(rows[name], "duplicate") if name == "duplicates" else f"{rows[name]:,} {name}" for name in rows]
    return ", ".join([kept, *others])
