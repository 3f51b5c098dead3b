"""Packed weights are the nearest integers of the model's own, and load where compressed-tensors is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("compressed_tensors")

from tasks.exporting.compressed import unfold_compressed, write_compressed
from tasks.exporting.errors import ExportError
from tasks.exporting.proof import AnswerPlaces, prove_export
from tests.end_to_end.conftest import BASE_MODEL
from tests.tasks.training.conftest import build_model

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=[8, 4])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    folder = tmp_path_factory.mktemp("export")
    assert write_compressed(BASE_MODEL, folder, request.param) == ()
    return request.param, folder


def test_every_value_is_the_nearest_of_its_integers(made: tuple[int, Path], tmp_path: Path) -> None:
    bits, folder = made
    before, packed = load_file(BASE_MODEL / "model.safetensors"), load_file(folder / "model.safetensors")
    after = load_file(unfold_compressed(folder, tmp_path / "plain") / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not torch.equal(value.float(), after[name].float())}
    assert changed == {f"{name.removesuffix('.weight_packed')}.weight" for name in packed if "packed" in name}
    assert len(changed) == 4 * 7
    for name in changed:
        scale = packed[name.removesuffix("weight") + "weight_scale"].float()
        rows = before[name].reshape(*scale.shape, -1)
        steps = rows / scale[..., None]
        # Independent of the library: integers of so many bits, half a step away at most; one end of the range is cut.
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        wanted = steps.round().clamp(least, most) * scale[..., None]
        assert torch.allclose(after[name].reshape(rows.shape), wanted, atol=1e-6)
        assert float((after[name].reshape(rows.shape) / scale[..., None] - steps).abs().max()) <= 0.51
    ratio = (folder / "model.safetensors").stat().st_size / (BASE_MODEL / "model.safetensors").stat().st_size
    assert ratio < (0.45 if bits == 8 else 0.35)  # the embedding, a fifth of this model, stays as it is


def test_transformers_reads_the_folder_as_it_is(made: tuple[int, Path], tmp_path: Path) -> None:
    _, folder = made
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    assert settings["ignore"] == ["lm_head"]
    plain = AutoModelForCausalLM.from_pretrained(unfold_compressed(folder, tmp_path / "plain"))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, plain(ids).logits, atol=1e-3)


def test_proof_tells_eight_bits_from_four(tmp_path: Path) -> None:
    examples = [AnswerPlaces(list(range(40, 72)), list(range(4, 30)))]
    divergences = []
    for bits in (8, 4):
        (tmp_path / str(bits)).mkdir()
        write_compressed(BASE_MODEL, tmp_path / str(bits), bits)
        plain = unfold_compressed(tmp_path / str(bits), tmp_path / f"{bits}-plain")
        divergences.append(prove_export(BASE_MODEL, plain, examples, [1]).mean_kl)
    assert 0 < divergences[0] < 0.01
    assert divergences[1] > 5 * divergences[0]


def test_inputs_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    parent = build_model(tmp_path / "model", intermediate_size=40)
    (tmp_path / "export").mkdir()
    with pytest.raises(ExportError, match=r"down_proj has 40 inputs, no multiple of 32: take the form int8"):
        write_compressed(parent, tmp_path / "export", 4)
    write_compressed(parent, tmp_path / "export", 8)
    assert f"{LAYER}.weight_packed" in load_file(tmp_path / "export" / "model.safetensors")
