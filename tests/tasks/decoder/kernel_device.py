"""Where the Triton kernels are tested: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1), which needs none."""

import importlib.util
import os
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tasks.decoder import elementwise
from tasks.decoder.dropout import Dropout, Mask, MaskedTensor, derive_key
from tasks.decoder.elementwise import Quantized

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
EVERYTHING = not IS_INTERPRETED or os.environ.get("SFT_FAMILIES") == "all"
# The interpreter takes milliseconds for a row, cuts 16-bit numbers off in place of rounding them, and knows no float8.
NUM_ROWS = 3 if IS_INTERPRETED else 77
DTYPES = (torch.float32,) if IS_INTERPRETED else (torch.bfloat16, torch.float32)
COPIES = (False,) if IS_INTERPRETED else (False, True)
needs_kernels = pytest.mark.skipif(
    not (IS_INTERPRETED or torch.cuda.is_available()), reason="needs a CUDA device, or Triton and TRITON_INTERPRET=1"
)


def load_kernels() -> ModuleType:
    from tasks.decoder import kernels

    return kernels


def draw(*shape: int, dtype: torch.dtype = DTYPES[0]) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def rooms(rows: int, width: int, pad: int = 64, dtype: torch.dtype = DTYPES[0]) -> list[Tensor]:
    """Two places to write to, poisoned, with columns beside them."""
    places = [torch.full((rows, width + pad), 7.0, device=DEVICE, dtype=dtype) for _ in range(2)]
    return [place[:, :width] for place in places]


def assert_same(left: Tensor, right: Tensor, limit: float = 1e-3) -> None:
    assert float((left.double() - right.double()).norm() / right.double().norm()) < limit


def make(p: float, site: int) -> Mask:
    dropout = Dropout(p, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    dropout.start_forward(derive_key(3, 4, site))
    return dropout.mask(site)


def assert_masked(masked: Tensor, values: Tensor, mask: Mask) -> None:
    """Every bit of a masked copy is that of the plain generator's."""
    wanted = torch.empty_like(values)
    elementwise.drop(values, MaskedTensor(wanted, mask))
    assert torch.equal(masked, wanted)
    assert 0 < int((wanted == 0).sum()) < wanted.numel()


def copy(rows: int, width: int, is_wanted: bool) -> Quantized | None:
    if not is_wanted:
        return None
    values = torch.zeros(rows, width, device=DEVICE).to(torch.float8_e4m3fn)
    return Quantized(values, torch.zeros(rows, 1, device=DEVICE))
