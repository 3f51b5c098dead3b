"""Which class of transformers a checkpoint loads with: its own, so that nothing of a composite is left behind."""

from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FamilyError(ValueError):
    """A family of models that cannot be trained here; the message says what it is, why not, and what would do."""


def read_config(folder: Path) -> Any:
    """Read config.json of a model folder.

    Raises:
        FamilyError: transformers does not know it, or it asks for code of its own.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise FamilyError(
            f"{folder}: config.json describes no model that this transformers knows ({_first_line(error)}): a model of "
            "transformers without code of its own is wanted"
        ) from error


def choose_class(config: Any, place: object) -> "type[PreTrainedModel]":
    """Return the class that a config's checkpoint was written by.

    A composite (a text decoder inside an image or audio model) loads as the composite.

    Args:
        config: of the whole checkpoint.
        place: names it in errors.

    Raises:
        FamilyError: it writes no text token by token.
    """
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_encoder_decoder", False):
        raise FamilyError(
            f"{place}: {config.model_type} is an encoder-decoder model, which is not trained here: choose a "
            "decoder-only one"
        )
    # The composites come first: some of them are also listed by their text part alone.
    mappings = (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,  # of sound and text, some of them decoders
    )
    candidates = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    flat: list[Any] = [kind for entry in candidates for kind in (entry if isinstance(entry, tuple) else (entry,))]
    named = getattr(config, "architectures", None) or []
    if not flat:
        raise FamilyError(
            f"{place}: {config.model_type} ({', '.join(named) or 'no architecture named'}) is no language model that "
            "writes text token by token: choose a causal one"
        )
    kind = next((kind for kind in flat if kind.__name__ in named), flat[0])
    _check_forward(kind, place)
    return kind


def _check_forward(kind: Any, place: object) -> None:
    """Raise FamilyError unless text is all that a model's forward pass needs."""
    arguments = signature(kind.forward).parameters
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    wanted = [name for name, each in arguments.items() if each.kind in named and each.default is Parameter.empty]
    further = [name for name in wanted if name not in ("self", "input_ids")]
    if further or "input_ids" not in arguments:
        needs = f"needs {' and '.join(further)}" if further else "takes no text by itself"
        raise FamilyError(
            f"{place}: {kind.__name__} {needs}, so that it is not trained here, where text alone is read: choose a "
            "language model"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
