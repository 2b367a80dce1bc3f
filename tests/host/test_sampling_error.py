"""What a format costs when ComfyUI samples with it: no more than the size of its error explains.

The reference, the noise and the merged LoRA are in the core's own MODEL with dense weights;
benchmarks/sampling_error.py measures the same on the nano model.
"""

from __future__ import annotations

import functools
from pathlib import Path

import comfy.sd
import drawing
import pytest
import torch
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from core_flux import core_model_of
from dense import stored_tensors
from flux_files import write_flux
from lora_files import KINDS
from torch import Tensor

NUM_DRAWS = 3
EXPLAINED = 1.2
"""In a network this small the error of one noise differs from another's by a tenth."""


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(params=list(FORMATS))
def loaded(request: pytest.FixtureRequest, flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format=request.param)


def draw(model) -> Tensor:
    """Two pictures after four steps."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 20, 128, generator=generator)
    pooled = torch.randn(1, 64, generator=generator)
    positive = [[embeds, {"pooled_output": pooled, "guidance": 2.5}]]
    with torch.inference_mode():
        drawn = [drawing.draw(model, positive, steps=4, seed=seed) for seed in (0, 1)]
        return model.model.process_latent_in(torch.cat(drawn))


def relative_error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


stored = functools.cache(stored_tensors)


def noisy_tensors(format: str, seed: int) -> dict[str, Tensor]:
    """bf16's tensors, each with Gaussian noise of the norm of what `format` changes in it."""
    generator = torch.Generator().manual_seed(100 + seed)  # not the weights' own
    tensors = {}
    for name, tensor in stored("bf16").items():
        noise = torch.randn(tensor.shape, generator=generator)
        lost = (stored(format)[name] - tensor).norm()
        tensors[name] = tensor + noise * (lost / noise.norm())
    return tensors


def test_a_format_draws_as_near_to_bf16_as_noise_of_its_size(loaded: LoadedFlux) -> None:
    reference = draw(core_model_of(stored("bf16")))
    found = relative_error(draw(build_model(loaded, torch.float32)), reference)
    noisy = [
        relative_error(draw(core_model_of(noisy_tensors(loaded.format, seed))), reference)
        for seed in range(NUM_DRAWS)
    ]
    assert found <= EXPLAINED * sum(noisy) / NUM_DRAWS + 1e-5


def test_a_lora_beside_packed_weights_draws_as_one_merged_into_dense_ones(
    loaded: LoadedFlux,
) -> None:
    tensors = KINDS["plain"](torch.Generator().manual_seed(0))
    before = loaded.store.content_hash()
    model = build_model(loaded, torch.float32)
    plain, live = draw(model), draw(add_lora(model, tensors, 1.0))
    dense = core_model_of(stored(loaded.format))
    merged, _ = comfy.sd.load_lora_for_models(dense, None, tensors, 1.0, 0.0)
    assert relative_error(live, plain) > 0.01
    assert relative_error(live, draw(merged)) <= 1e-5
    assert loaded.store.content_hash() == before
