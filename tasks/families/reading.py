"""Whether a model reads text alone: its forward pass over some tokens, without values."""

from typing import Any

import torch

from tasks.families.classes import FamilyError
from tasks.families.registry import find_family

_NUM_TOKENS = 4


def check_reads_text(skeleton: Any) -> None:
    """Run a model without values (meta device) over tokens alone.

    It ends early in most models, where values are asked for; what a model asks its caller for comes before.

    Raises:
        FamilyError: it says itself that it wants more than tokens.
    """
    tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            skeleton(input_ids=tokens, use_cache=False)
    except ValueError as error:  # of the model's own code: PyTorch's are others
        raise FamilyError(
            f"{type(skeleton).__name__} does not read text alone ({' '.join(str(error).split())}): choose a language "
            "model"
        ) from error
    except Exception:  # meta tensors have no values: nothing is known
        pass


def let_read_text(model: Any) -> None:
    """Keep modules of a model that ask for more than text in training, and only there, out of that mode.

    Their parts, which have dropout, follow the model's mode.
    """
    asking = find_family(model.config).asking
    for module in model.modules():
        if type(module).__name__ in asking:
            module.register_forward_pre_hook(_leave_training)


def _leave_training(module: Any, arguments: object) -> None:
    module.training = False
