"""Models and tokenizers from folders: safetensors only, and none of their code is ever run.

torch and the classes of models are imported where a model is: processes that only tokenize start in a third of the
time without them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from schemas.plurals import count_of
from tasks import garbage
from tasks.families.weights import WeightsError, check_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")

_MOST_CHARACTERS = 500
_GROUPED_SIZES = 8
_EXPERT_DIMS = 3


def shorten(error: Exception) -> str:
    """Return an error of a library, which may hold all of a file, as a text of at most _MOST_CHARACTERS."""
    text = str(error)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"


class ModelError(ValueError):
    """A model or tokenizer folder that cannot be used."""


def choose_device() -> "torch.device":
    """Return the GPU when there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_dtype(precision: str, device: "torch.device") -> "torch.dtype":
    """Map auto, bf16 or fp32 to a dtype; auto is bf16 on a GPU that has it, else fp32."""
    import torch

    if precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def read_context_length(folder: Path) -> int | None:
    """Return the most positions that config.json of a model folder allows; None where it does not say."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = {**values, **(values.get("text_config") or {})}
    length = values.get("max_position_embeddings") or values.get("n_positions")
    return int(length) if length else None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies in a folder, without running code of the folder.

    Raises:
        ModelError: nothing there loads.
    """
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        # Without one, transformers makes an empty tokenizer of the model's class and says nothing.
        raise ModelError(f"{folder}: no tokenizer lies here: one of {', '.join(_VOCABULARY_FILES)} is wanted")
    try:
        with garbage.paused():
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        tokenizer("a")  # settings of other types than they should be are an error only in use
    except Exception as error:
        raise ModelError(
            f"{folder}: no tokenizer loads from here ({shorten(error)}): tokenizer.json is wanted"
        ) from error
    return tokenizer


def load_model(
    folder: Path,
    *,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | None" = None,
    quantization: Any = None,
) -> "PreTrainedModel":
    """Load a language model from a folder with its own class, in eval mode.

    Attention is PyTorch's fused one where the family has it, else the family's own.

    Args:
        folder: config.json and safetensors weights.
        dtype: of the weights in memory; the checkpoint's own when None.
        device: the CPU when None; meta gives the model without its values.
        quantization: transformers' description of how to quantize the weights while loading.

    Raises:
        ModelError: nothing there loads, the weights are not safetensors files in the folder, or they are not exactly
            those of the model.
    """
    import torch

    from tasks.families.classes import FamilyError, choose_class, read_config
    from tasks.families.reading import let_read_text
    from tasks.kernel_forms import offer_kernel_forms

    place = device or torch.device("cpu")
    options: dict[str, Any] = {}
    if place.type != "cpu" or quantization is not None:
        options["device_map"] = {"": place}  # tensor by tensor: the host never holds the whole model
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        config = read_config(folder)
        offer_kernel_forms(config)
        kind: Any = choose_class(config, folder)
        check_weights(folder)
        unpacking = None if quantization is not None else _choose_unpacking(config)
        if unpacking is not None:
            options["quantization_config"] = unpacking
        model, report = kind.from_pretrained(
            str(folder),
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
            **options,
        )
    except (FamilyError, WeightsError) as error:
        raise ModelError(str(error)) from error
    except Exception as error:
        raise ModelError(f"{folder}: no language model loads from here ({shorten(error)})") from error
    _check_weights(folder, type(model).__name__, report)
    let_read_text(model)
    if has_odd_experts(model):
        model.set_experts_implementation("eager")  # one expert after the other
    if unpacking is not None and dtype is not None:
        model.to(dtype)  # what was unpacked is in bf16, and of FP8 in the dtype that was asked for
        _round_unpacked(model)
    return cast("PreTrainedModel", model.eval())


def check_headers(folder: Path, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Refuse the weights that `load_model` would refuse, by their names and shapes: transformers loads none of them.

    Args:
        folder: with config.json, whose quantization is left out: the tensors are those of an unquantized model.
        tensors: of the checkpoint, by name, without values (meta device).

    Raises:
        ModelError: they are not exactly those of the model.
    """
    from transformers.utils import logging

    from tasks.families.classes import choose_class, read_config

    config = read_config(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind: Any = choose_class(config, folder)
    showed = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
    finally:
        if showed:
            logging.enable_progress_bar()
    _check_weights(folder, type(model).__name__, report)


def has_odd_experts(model: Any) -> bool:
    """Say whether routed experts have sizes that PyTorch's grouped products do not take: rows on 16 bytes, in bf16."""
    return any(
        size % _GROUPED_SIZES
        for module in model.modules()
        if hasattr(module, "is_transposed")  # what transformers leaves on a module of experts
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == _EXPERT_DIMS
        for size in parameter.shape[1:]
    )


def _choose_unpacking(config: Any) -> Any:
    """Return how transformers unpacks a checkpoint's matrices in MXFP4 (gpt-oss) or FP8; None where there are none.

    Packed matrices take no adapter: they are unpacked, whatever kernels are installed.
    """
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    found = getattr(config, "quantization_config", None) or {}
    how = found.get("quant_method") if isinstance(found, dict) else None
    if how == "mxfp4":
        return Mxfp4Config(dequantize=True)
    if how == "fp8":
        return FineGrainedFP8Config(**{**found, "dequantize": True})
    return None


def _round_unpacked(model: "PreTrainedModel") -> None:
    """Round matrices to bf16, in which a merged model stores what was packed; the others lie in the files so."""
    import torch

    from tasks.families.adaptation import CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTER, list_kinds

    apart = (CONVOLUTIONS, EMBEDDINGS, HEAD, OUTSIDE, ROUTER)  # some of them are stored in fp32
    kinds = list_kinds(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and kinds[name] not in apart:
                parameter.copy_(parameter.to(torch.bfloat16))


def _check_weights(folder: Path, kind: str, report: Mapping[str, Any]) -> None:
    """Raise ModelError unless every weight of the model was in the files, and every weight of the files was used."""
    problems = []
    for what, names in (
        ("missing from", report["missing_keys"]),
        ("unknown to the model in", report["unexpected_keys"]),
    ):
        if names:
            shown = ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            problems.append(f"{count_of(len(names), 'weight is', 'weights are')} {what} the files: {shown}")
    if report["mismatched_keys"]:
        shapes = [
            f"{name} is {list(found)} and not {list(wanted)}" for name, found, wanted in report["mismatched_keys"]
        ]
        problems.append(f"shapes differ: {', '.join(sorted(shapes)[:8])}")
    if problems:
        raise ModelError(
            f"{folder}: the weights are not those of {kind}: {'; '.join(problems)}: fetch the whole checkpoint again, "
            "or correct config.json"
        )
