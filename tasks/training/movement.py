"""Checks after a training that every trained tensor has changed, and names those that have not.

A matrix is compared with its start by the sum of its values' bits, experts one by one, so that no second copy of the
adapter is held. The matrix B starts at zero and moves in the first step that reaches it; A follows in the next.
"""

from collections.abc import Mapping

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

# Steps after which A must have moved: its gradient is zero in the first, because B is.
_STEPS_TO_MOVE_A = 2


def take_fingerprints(model: nn.Module, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a number (int64) for each trained tensor [1], or for each expert's part of it [E].

    Args:
        model: says how many experts a matrix is of.
        trained: values by the names of `collect_trained`, fp32.
    """
    experts = {
        f"{path}.": module.num_experts for path, module in model.named_modules() if isinstance(module, ParamWrapper)
    }
    return {
        name: _fingerprint(name, value.detach(), experts.get(name.partition("lora_")[0], 1))
        for name, value in trained.items()
    }


def find_unmoved(start: Mapping[str, Tensor], end: Mapping[str, Tensor], *, num_steps: int) -> list[str]:
    """Say in sentences which trained tensors, and which experts' parts of them, are as they were at the start.

    Args:
        start: of `take_fingerprints`, before the first step.
        end: the same, after the last.
        num_steps: done in between.
    """
    still: list[str] = []
    resting: dict[str, int] = {}
    for name, before in start.items():
        is_a = ".lora_A." in name
        if is_a and (num_steps < _STEPS_TO_MOVE_A or len(before) > 1):
            continue
        same = int((before == end[name]).sum())
        if same == len(before):
            still.append(name)
        elif same:
            resting[name] = same
    sentences = []
    if still:
        sentences.append(
            f"{len(still)} of {len(start)} trained tensors did not move, such as {_shorten(still[0])}: nothing of the "
            "data reached them; leave them out of training.target_modules, or train longer"
        )
    if resting:
        first = next(iter(resting))
        total = sum(len(start[name]) for name in resting)
        sentences.append(
            f"{sum(resting.values())} of {total} experts' matrices in {len(resting)} weights did not move, such as "
            f"{resting[first]} of {len(start[first])} in {_shorten(first)}: no token was routed to these experts"
        )
    return sentences


def _fingerprint(name: str, value: Tensor, num_experts: int) -> Tensor:
    """Add up bits: of A [E r, in] the rows of each expert lie together, of B [out, r E] every E-th column is one's."""
    bits = value.float().contiguous().view(torch.int32)
    if num_experts == 1:
        return bits.sum(dtype=torch.int64).reshape(1).cpu()
    if ".lora_A." in name:
        return bits.sum(1, dtype=torch.int64).view(num_experts, -1).sum(1).cpu()
    return bits.sum(0, dtype=torch.int64).view(-1, num_experts).sum(0).cpu()


def _shorten(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
