import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tasks.merging import shards
from tasks.merging.changes import Change, LowRank, MergeError, Replacement
from tasks.merging.shards import PlannedTensor, read_headers, write_shards

# Dtypes of every width, in the order that would misalign the wide ones; rows that no block divides evenly.
TENSORS = {
    "mask": torch.tensor([True, False, True]),
    "half": torch.arange(21, dtype=torch.bfloat16).reshape(7, 3),
    "scale": torch.tensor(0.25),
    "empty": torch.empty(0, 4),
    "wide": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "ids": torch.tensor([[1], [-2], [1 << 40]]),
    "byte": torch.arange(5, dtype=torch.uint8),
    "float8": torch.arange(6, dtype=torch.float32).to(torch.float8_e4m3fn),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def plan(source: Path, changes: dict[str, Change]) -> list[PlannedTensor]:
    stored = read_headers(source)
    return [PlannedTensor(name, stored[name], changes.get(name)) for name in TENSORS]


@pytest.mark.parametrize("block_bytes", [1, 17, 1 << 23])
def test_what_is_not_changed_is_the_same_bit_for_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(plan(source, {}), folder, 10**6)
    written = load_file(folder / "model.safetensors")
    assert written.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (written[name].dtype, written[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(written[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    for name, stored in read_headers(folder).items():
        assert stored.begin % TENSORS[name].element_size() == 0, name
    with safe_open(folder / "model.safetensors", framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}


@pytest.mark.parametrize("block_bytes", [1, 30, 1 << 23])
def test_blocks_change_their_own_rows(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", block_bytes)
    a, b = torch.tensor([[1.0, 0.0, 2.0]]), torch.arange(7.0)[:, None]
    changes: dict[str, Change] = {
        "half": LowRank(a, b, 0.5),
        "wide": Replacement(torch.full((5, 7), 9.0)),
        "scale": Replacement(a[0, 2]),
    }
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(plan(source, changes), folder, 10**6)
    written = load_file(folder / "model.safetensors")
    # Row n of half is 3n, 3n + 1, 3n + 2; to it comes n / 2 * (1, 0, 2).
    assert written["half"].tolist() == [[3.5 * n, 3.0 * n + 1, 4.0 * n + 2] for n in range(7)]
    assert written["wide"].tolist() == [[9.0] * 7] * 5
    assert written["scale"].item() == 2.0


def test_files_are_filled_up_to_the_limit(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    write_shards(plan(source, {}), folder, 60)
    # mask 3, half 42, scale 4, empty 0 | wide 140 alone | ids 24, byte 5, float8 6
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 224
    numbers = {name: int(file.split("-")[1]) for name, file in index["weight_map"].items()}
    assert numbers == {
        "mask": 1, "half": 1, "scale": 1, "empty": 1, "wide": 2, "ids": 3, "byte": 3, "float8": 3,
    }  # fmt: skip
    assert read_headers(folder).keys() == TENSORS.keys()


def test_nan_names_its_tensor_and_ends_the_others(source: Path, tmp_path: Path) -> None:
    values = torch.zeros(5, 7)
    values[4, 6] = float("nan")
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(MergeError, match=r"^wide: NaN or infinity after merging into torch.float32"):
        write_shards(plan(source, {"wide": Replacement(values)}), folder, 10**6)


def test_a_file_that_has_become_shorter_is_named(source: Path, tmp_path: Path) -> None:
    planned = plan(source, {})
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(MergeError, match=r"model.safetensors: \w+ cannot be read \(the file ends\)"):
        write_shards(planned, folder, 10**6)
    with pytest.raises(MergeError, match=r"model.safetensors: cannot be read"):
        read_headers(source)
