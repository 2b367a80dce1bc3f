"""Files that bitsandbytes packed into 4 bits, compared with bitsandbytes' own dequantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import load_flux
from atelier.trainers.store import WeightStore
from dense import ROUND_TRIPS, to_diffusers
from flux_files import flux_tensors
from four_bit_files import FourBitFlux, dequantized, linear4bit
from safetensors.torch import save_file
from torch import Tensor

PACKINGS = {
    "double quantization": {"nested": True},
    "plain scales": {"nested": False},
    "blocks of 128": {"block_size": 128},
    "fp4": {"kind": "fp4"},
}
REUSED = {"double quantization": "nf4", "plain scales": "nf4", "fp4": "fp4"}
"""Packing to the format of the store that has the same bytes."""


@pytest.fixture(scope="module", params=PACKINGS)
def flux(request: pytest.FixtureRequest) -> tuple[str, FourBitFlux]:
    return request.param, FourBitFlux(**PACKINGS[request.param])


def store_of(flux: FourBitFlux, folder: Path, format: str) -> WeightStore:
    return load_flux(flux.write(folder / "flux.safetensors"), format=format).store


def is_in_block(diffusers_name: str) -> bool:
    return "transformer_blocks." in diffusers_name


def unpacked(store: WeightStore) -> dict[str, Tensor]:
    """The store's tensors in float32 under diffusers' names, by diffusers' converter."""
    matrices = {name: packed.dequantize(torch.float32) for name, packed in store.packed.items()}
    return to_diffusers({**matrices, **store.plain})


@pytest.mark.parametrize("format", FORMATS)
def test_a_store_holds_what_bitsandbytes_dequantizes(
    tmp_path: Path, flux: tuple[str, FourBitFlux], format: str
) -> None:
    """Bit for bit in float32 where the bytes are used as they are; else packed from bf16."""
    packing, source = flux
    found = unpacked(store_of(source, tmp_path, format))
    for name, layer in source.layers.items():
        theirs = dequantized(layer)
        if not is_in_block(name):
            theirs = theirs.bfloat16().float()
        elif REUSED.get(packing) != format:
            theirs = ROUND_TRIPS[format](theirs.bfloat16())
        assert torch.equal(found[name], theirs), name
    assert all(torch.equal(found[name], tensor) for name, tensor in source.plain.items())


@pytest.mark.parametrize("packing", REUSED)
def test_the_bytes_are_used_as_they_are(tmp_path: Path, packing: str) -> None:
    source = FourBitFlux(**PACKINGS[packing])
    qkv = store_of(source, tmp_path, REUSED[packing]).packed["double_blocks.0.txt_attn.qkv.weight"]
    parts = [f"transformer_blocks.0.attn.add_{part}_proj.weight" for part in "qkv"]
    bytes_of_parts = [source.layers[part].weight.data.flatten() for part in parts]
    assert torch.equal(qkv.data.flatten(), torch.cat(bytes_of_parts))


def test_original_names_load_too(tmp_path: Path) -> None:
    """As in single files for ComfyUI, with the prefix of a checkpoint."""
    layers, tensors = {}, {}
    for name, tensor in flux_tensors().items():
        if tensor.ndim == 2:
            layers[name] = linear4bit(tensor, nested=False)
            state = layers[name].state_dict()
            prefix = name.removesuffix("weight")
            tensors |= {f"model.diffusion_model.{prefix}{end}": t for end, t in state.items()}
        else:
            tensors[f"model.diffusion_model.{name}"] = tensor
    save_file(tensors, tmp_path / "flux.safetensors")
    store = load_flux(tmp_path / "flux.safetensors", format="nf4").store
    for name, layer in layers.items():
        expected = dequantized(layer)
        if not name.startswith(("double_blocks.", "single_blocks.")):
            expected = expected.bfloat16().float()
        assert torch.equal(store.packed[name].dequantize(torch.float32), expected), name


def test_the_identity_follows_the_scales(tmp_path: Path) -> None:
    """Two packings of the same matrices are two models."""
    paths = [
        FourBitFlux(nested=nested).write(tmp_path / str(nested) / "flux.safetensors")
        for nested in (True, False)
    ]
    assert len({load_flux(path, format="nf4").identity for path in paths}) == 2


@pytest.mark.parametrize("end", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_missing_scale_is_one_sentence(tmp_path: Path, end: str) -> None:
    tensors = FourBitFlux().file_tensors()
    name = f"transformer_blocks.0.ff.net.2.weight.{end}"
    del tensors[name]
    save_file(tensors, tmp_path / "flux.safetensors")
    message = f"^'flux.safetensors' is an incomplete FLUX.1 model: '{name}' is missing\\. Download"
    with pytest.raises(ValueError, match=message):
        load_flux(tmp_path / "flux.safetensors", format="nf4")
