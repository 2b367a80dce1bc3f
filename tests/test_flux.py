"""FLUX's names, shapes and training face, compared with diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from atelier.trainers.adapters import attach_lora
from atelier.trainers.flux import (
    FluxConfig,
    build_transformer,
    image_ids,
    pack_latents,
    unpack_latents,
    velocity,
)
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.packed_weight import PackedWeight
from atelier.trainers.store import WeightStore
from dense import dense_transformer, stored_tensors
from diffusers import FluxPipeline
from flux_files import flux_shapes, write_flux

SIZES = [(8, 8), (12, 6), (2, 16)]
SIGMA = torch.tensor([0.7, 0.2])
PARAMETERS_OF_THE_RECIPE = 4_669_440
"""What the Hugging Face QLoRA blog's script reports for FLUX.1-dev at rank 4."""


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_packed_latents_are_those_of_diffusers(height: int, width: int) -> None:
    latents = torch.randn(2, 16, height, width)
    expected = FluxPipeline._pack_latents(latents, 2, 16, height, width)
    assert torch.equal(pack_latents(latents), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_unpacked_latents_are_those_of_diffusers(height: int, width: int) -> None:
    tokens = torch.randn(2, height * width // 4, 64)
    expected = FluxPipeline._unpack_latents(tokens, height * 8, width * 8, 8)
    assert torch.equal(unpack_latents(tokens, height, width), expected)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_unpacking_undoes_packing(height: int, width: int) -> None:
    latents = torch.randn(2, 16, height, width)
    assert torch.equal(unpack_latents(pack_latents(latents), height, width), latents)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_positions_of_the_image_are_those_of_diffusers(height: int, width: int) -> None:
    expected = FluxPipeline._prepare_latent_image_ids(
        1, height // 2, width // 2, torch.device("cpu"), torch.float32
    )
    assert torch.equal(image_ids(height, width, torch.device("cpu")), expected)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 16, 8, 4, generator=generator),
        "prompt_embeds": torch.randn(2, 10, 128, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
    }


def diffusers_velocity(tensors: dict[str, torch.Tensor], guidance: float) -> torch.Tensor:
    """The call of diffusers' FluxPipeline on a plain network that holds `tensors`."""
    values = inputs()
    with torch.no_grad():
        tokens = dense_transformer(tensors)(
            hidden_states=FluxPipeline._pack_latents(values["latents"], 2, 16, 8, 4),
            encoder_hidden_states=values["prompt_embeds"],
            pooled_projections=values["pooled"],
            timestep=SIGMA,
            guidance=torch.full((2,), guidance)
            if "guidance_in.in_layer.weight" in tensors
            else None,
            img_ids=FluxPipeline._prepare_latent_image_ids(
                1, 4, 2, torch.device("cpu"), torch.float32
            ),
            txt_ids=torch.zeros(10, 3),
        ).sample
    return FluxPipeline._unpack_latents(tokens, 64, 32, 8)


@pytest.mark.parametrize("is_distilled", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_training_face_is_diffusers_network_with_the_stored_weights(
    tmp_path: Path, format: str, is_distilled: bool
) -> None:
    sizes = {"guidance": is_distilled, "depth_single": 2}
    loaded = load_flux(write_flux(tmp_path / "flux.safetensors", **sizes), format=format)
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    with torch.no_grad():
        found = velocity(transformer, **inputs(), sigma=SIGMA, guidance=3.5)
    expected = diffusers_velocity(stored_tensors(format, **sizes), 3.5)
    assert torch.max(torch.abs(found - expected)) <= 1e-5


def test_guidance_changes_a_distilled_network(tmp_path: Path) -> None:
    loaded = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    with torch.no_grad():
        one, other = (
            velocity(transformer, **inputs(), sigma=SIGMA, guidance=guidance)
            for guidance in (1.0, 3.5)
        )
    assert not torch.allclose(one, other, atol=1e-3)


def test_schnell_takes_no_guidance(tmp_path: Path) -> None:
    path = write_flux(tmp_path / "flux.safetensors", guidance=False)
    loaded = load_flux(path, format="bf16")
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    assert not loaded.config.guidance
    assert not transformer.config.guidance_embeds


def test_the_network_holds_no_matrix_of_its_own(tmp_path: Path) -> None:
    loaded = load_flux(write_flux(tmp_path / "flux.safetensors"), format="nf4")
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    tensors = {**dict(transformer.named_parameters()), **dict(transformer.named_buffers())}
    assert {tensor.ndim for tensor in tensors.values()} == {1}  # biases and QK-norm scales


def flux_dev_on_meta() -> tuple[WeightStore, FluxConfig]:
    """FLUX.1-dev's true shape without any memory."""
    shapes = flux_shapes(width=3072, depth=19, depth_single=38, context=4096, vector=768)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    packed = {
        name: PackedWeight("bf16", tensor.bfloat16(), None, tensor.shape[1])
        for name, tensor in tensors.items()
        if tensor.ndim == 2
    }
    plain = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    return WeightStore(packed, plain), FluxConfig.from_shapes(shapes)


def test_the_recipe_trains_as_many_parameters_as_the_blog_on_flux_dev() -> None:
    store, config = flux_dev_on_meta()
    transformer = build_transformer(store, config, torch.bfloat16)
    lora = attach_lora(transformer, LoraSettings(rank=4, targets="qlora"), seed=0)
    assert sum(p.numel() for p in lora.parameters.values()) == PARAMETERS_OF_THE_RECIPE


def test_the_numbers_of_flux_dev_are_read_from_its_shapes() -> None:
    _, config = flux_dev_on_meta()
    assert config == FluxConfig(
        hidden_size=3072,
        depth=19,
        depth_single=38,
        in_channels=64,
        context_dim=4096,
        vector_dim=768,
        guidance=True,
    )
    assert config.num_heads == 24
