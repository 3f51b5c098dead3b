"""Known forms of flash-linear-attention's kernels are offered where they were found, filed as the library looks."""

import hashlib
import json
import os
from types import SimpleNamespace

import pytest
import torch

from tasks.kernel_forms import FOLDER, offer_kernel_forms


@pytest.mark.parametrize(
    ("capability", "sizes", "mode", "offered"),
    [
        ((9, 0), (128, 128), None, True),
        ((10, 0), (128, 128), None, False),
        ((9, 0), (128, 256), None, False),
        ((9, 0), None, None, False),
        ((9, 0), (128, 128), "strict", False),
    ],
)
def test_forms_are_offered_where_they_were_found(
    capability: tuple[int, int],
    sizes: tuple[int, int] | None,
    mode: str | None,
    offered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {} if mode is None else {"FLA_CACHE_MODE": mode})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    text = SimpleNamespace()
    if sizes is not None:
        text.linear_key_head_dim, text.linear_value_head_dim = sizes
    offer_kernel_forms(SimpleNamespace(get_text_config=lambda: text))
    assert (os.environ.get("FLA_CONFIG_DIR") == str(FOLDER)) == offered


def test_forms_are_filed_as_the_library_looks_for_them() -> None:
    """By the digest of what a kernel's form depends on: one that is not found costs seconds in each first use."""
    files = sorted(FOLDER.glob("*.json"))
    assert len(files) == 9
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["kernel_name"] == file.stem
        for digest, entry in found["autotune_entries"].items():
            key = json.dumps(entry["autotune_key"], separators=(",", ":"), sort_keys=True)
            assert hashlib.md5(key.encode()).hexdigest() == digest
            assert {"kwargs", "num_warps", "num_stages", "num_ctas"} <= entry["config"].keys()
