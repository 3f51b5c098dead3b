"""Which files a folder's weights would be read from: safetensors inside the folder, and nothing else.

transformers follows what config.json and the index of the shards name, a pickled file or an adapter's base model too.
Pickled weights can hide code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_INDEX = "*.safetensors.index.json"
_NAMED = 3


class WeightsError(ValueError):
    """A model folder whose weights are not, or not only, safetensors files inside it."""


def check_weights(folder: Path) -> None:
    """Look at every place that names weight files.

    Raises:
        WeightsError: there are no safetensors, or something is named that is none, lies elsewhere or is missing.
    """
    if (folder / "adapter_config.json").exists():
        raise WeightsError(
            f"{folder}: adapter_config.json makes this an adapter, which loads another model below it: give the folder "
            "of the base model, or merge the adapter into it first (sft merge)"
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = (
            f" (found {', '.join(others[:_NAMED])}, which can hide code: where you trust them, load the model with "
            "transformers and save it again (save_pretrained), which writes safetensors)"
            if others
            else ""
        )
        raise WeightsError(f"{folder}: no *.safetensors weights{found}")
    for place, name in _list_named(folder):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightsError(
                f"{place}: it names {name[:80]!r}, and only *.safetensors files in the same folder are read, since "
                "others can hide code: convert them, or correct it"
            )
        if not (folder / name).is_file():
            raise WeightsError(f"{place}: it names {name}, which is missing: fetch the whole checkpoint again")


def _list_named(folder: Path) -> Iterator[tuple[Path, str]]:
    """Give the file that names weights, and each name in it, as text whatever it is."""
    for index in sorted(folder.glob(_INDEX)):
        names = _read_object(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise WeightsError(f"{index}: weight_map, the files by the names of the weights, is missing")
        yield from ((index, name) for name in dict.fromkeys(map(str, names.values())))
    config = folder / "config.json"
    if config.is_file():
        name = _read_object(config).get("transformers_weights")
        if name is not None and folder / str(name) not in folder.glob(_INDEX):
            yield config, str(name)


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: it is no object, or no JSON.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{file}: a JSON object is wanted, got {str(values)[:80]!r}")
    return values
