"""What is particular about a family of models: one row each. Whatever has no row follows the general rules.

A row is added where a tiny model of the family does not pass the matrix of families (tests/families), and says what is
so about it: linear weights that no adapter can stand beside, or why nothing of the family can be trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_READS_WEIGHT = "its module takes the weight itself, so that an adapter beside it would have no effect"
_MAMBA_KERNEL = "Mamba's kernels take the weight itself, so that an adapter beside it would have no effect"


@dataclass(frozen=True)
class Family:
    """What is particular about some model types of transformers."""

    model_types: tuple[str, ...]
    """Of the whole model, or of its text part."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Name of a module, and why no adapter stands beside the linear weights in it."""
    refused: str = ""
    """Why it is not trained here, and what would do, in words."""
    is_encoder: bool = False
    """Each token sees all of them, unless the config's `is_decoder` (of XLM `causal`) is true."""
    outside: tuple[str, ...] = ()
    """Modules inside its text decoder, by name or class, that see no token of a text run."""
    asking: tuple[str, ...] = ()
    """Classes of modules that ask in training, and only there, for what a text run has not, and do without it else."""


FAMILIES = (
    Family(
        ("mamba", "falcon_mamba"),
        skipped={"out_proj": _MAMBA_KERNEL, "dt_proj": _READS_WEIGHT},
    ),
    Family(("mamba2", "falcon_h1", "nemotron_h"), skipped={"out_proj": _MAMBA_KERNEL}),
    Family(("jamba",), skipped={"dt_proj": _READS_WEIGHT}),
    Family(
        ("gemma3n", "gemma3n_text"),
        skipped={"correction_coefs": _READS_WEIGHT},
    ),
    Family(("blt",), skipped={"patcher": "it cuts the text into patches, and such a choice has no gradient"}),
    Family(("phi4_multimodal",), outside=("embed_tokens_extend",)),
    Family(("fuyu",), outside=("vision_embed_tokens",)),
    Family(("mllama", "mllama_text_model"), outside=("MllamaCrossAttentionDecoderLayer",)),
    Family(
        ("dbrx",),
        skipped={"experts": "another module takes the weights, so that an adapter beside them would have no effect"},
    ),
    Family(("git",), outside=("image_encoder", "visual_projection")),
    Family(("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"), outside=("vision_moe",)),
    Family(("molmo2",), asking=("Molmo2Model",)),
    Family(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
            "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
            "xlm-roberta-xl", "xmod",
        ),
        is_encoder=True,
    ),
    Family(
        ("cpmant", "xlnet", "paligemma"),
        refused="its text is a prefix, in which each token sees those after it: choose a model that writes token by "
        "token",
    ),
    Family(
        ("diffusion_gemma",),
        refused="it writes blocks of tokens by diffusion: choose a model that writes token by token",
    ),
    Family(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        refused="it drafts for another model, whose keys and values it reads: choose that model",
    ),
    Family(
        ("kyutai_speech_to_text",),
        refused="it reads codes of speech beside each token: choose a language model",
    ),
    Family(
        ("reformer",),
        refused="its layers compute their inputs again by themselves, which leaves an adapter without a gradient: "
        "choose another model",
    ),
    Family(("shieldgemma2",), refused="it judges images and writes no text: choose a language model"),
)  # fmt: skip

_NO_ENCODER = "it reads what an encoder made, of which a text run has none"


_EVERY_FAMILY: Mapping[str, str] = {
    "indexer": "it chooses the positions that attention reads, and such a choice has no gradient",
    "encoder_attn": _NO_ENCODER,
    "crossattention": _NO_ENCODER,
}
"""As `Family.skipped`."""


def explain_refused(config: Any) -> str:
    """Return why nothing of a model is trained here, and what would do; empty where it may be."""
    family = find_family(config)
    if family.is_encoder and not any(getattr(config, name, False) for name in ("is_decoder", "causal")):
        return "it is an encoder, in which each token sees those after it: choose a model that writes token by token"
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) is True:
        return "its config has each token see those after it: choose a model that writes token by token"
    if getattr(config.get_text_config(), "prefix_lm", None) is True:
        return (
            "its config (prefix_lm) has the tokens of a prompt see those after them: set prefix_lm to false in the "
            "config.json of a copy of its folder to train it token by token, or choose another model"
        )
    return family.refused


def explain_skipped(family: Family, path: str) -> str:
    """Return why no adapter of a family stands beside the module at a path; empty where one may."""
    known = {**_EVERY_FAMILY, **family.skipped}
    return next((known[name] for name in path.split(".") if name in known), "")


def find_family(config: Any) -> Family:
    """Return the row of a config's model type, or else of its text part's; an empty one where there is none."""
    types = (config.model_type, config.get_text_config().model_type)
    rows = (row for model_type in types for row in FAMILIES if model_type in row.model_types)
    return next(rows, Family(types))
