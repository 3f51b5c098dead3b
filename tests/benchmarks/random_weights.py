"""Models of random weights for the benchmarks on a GPU: saved once, or, where they are large, made anew in each run.

And a tokenizer for them.
"""

from functools import partial
from pathlib import Path
from typing import Any

# Too large for many a disk: the folder has config and tokenizer, and what loads from it gets weights made on the GPU.
UNSAVED = ("qwen3-30b-a3b", "gpt-oss-20b", "moonlight-16b-a3b", "llama3-70b-24-layers", "llama3-70b")


def save_model(config: Any, folder: Path, shape: str) -> None:
    """Save a model of a shape with random weights in bf16, or, of a large one, what stands for it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    if shape in UNSAVED:
        config.save_pretrained(folder)
        save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
        return
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    calm_attention(model)
    model.save_pretrained(folder, max_shard_size="4GB")


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of four tokens, for what wants one and is given token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def calm_attention(model: Any) -> None:
    """Give the scores of attention the size that trained ones have, where nothing but a norm's weights scales them.

    Gemma 4 does not divide its scores by the root of the head's size. With its first weights, ones, each token looks at
    one other alone, and rounding grows by the layer until two right ways of computing the model differ by a gradient.
    """
    if getattr(model.config, "model_type", "").startswith("gemma4"):
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.data.fill_(len(parameter) ** -0.5)


def load_at_random(*, by_layer: bool = False) -> None:
    """Have transformers, and with it every trainer, fill models with random weights in place of a folder's.

    All ranks of a training draw the same: each on its own GPU, from the same seed.

    Args:
        by_layer: a layer's weights are made when it is brought to the GPU, as those of a file are read then.
    """
    import torch
    from transformers import AutoConfig, PreTrainedModel

    def load(cls: Any, path: Any, *args: Any, **settings: Any) -> Any:
        config = settings.get("config") or AutoConfig.from_pretrained(path)
        options = (
            {"attn_implementation": settings["attn_implementation"]} if settings.get("attn_implementation") else {}
        )
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = cls._from_config(config, dtype=torch.bfloat16, **options).eval() if not by_layer else None
        model = model or _build_by_layer(cls, config, options)
        model.name_or_path = str(path)
        report: dict[str, list[str]] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        return (model, report) if settings.get("output_loading_info") else model

    PreTrainedModel.from_pretrained = classmethod(load)  # type: ignore[assignment]


def _build_by_layer(kind: Any, config: Any, options: dict[str, Any]) -> Any:
    """Return a model like Llama, whose layers have weights of no memory until they are brought to a device."""
    import torch
    from torch import nn

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.bfloat16, **options).eval()
    inner = model.get_decoder()
    inner.rotary_emb = type(inner.rotary_emb)(config=config).to(place)
    inside = {id(module) for layer in inner.layers for module in layer.modules()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.zeros((), dtype=torch.bfloat16).expand(parameter.shape)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
            if id(module) not in inside:
                _fill(getattr(module, name), torch.Generator(place).manual_seed(0))
    for number, layer in enumerate(inner.layers):
        layer.to = partial(_bring, layer, number + 1)
    return model


def _fill(parameter: Any, generator: Any) -> None:
    """Give a parameter without memory values on the generator's device: ones for a norm."""
    import torch

    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=generator.device)
    parameter.data = values.fill_(1.0) if values.dim() == 1 else values.normal_(std=0.02, generator=generator)


def _bring(layer: Any, seed: int, place: Any) -> None:
    """Bring a layer to a device, and make the weights that have no memory yet there."""
    import torch

    generator = torch.Generator(place).manual_seed(seed)
    for parameter in layer.parameters():
        if not any(parameter.stride()):
            _fill(parameter, generator)
        parameter.data = parameter.data.to(place)
