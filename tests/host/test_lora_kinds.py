"""Every kind of LoRA in ComfyUI's own loader and in Apply LoRA (DESIGN I2, I4)."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import pytest
import torch
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora
from atelier.trainers.adapters import attach_lora, file_tensors, save_lora
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.flux_lora import parse_flux_lora
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_export import FORMATS, exported
from atelier.trainers.lora_file import read_lora
from atelier.trainers.lora_settings import LoraSettings
from flux_files import write_flux
from lora_kinds import KINDS, trained_like
from torch import Tensor, nn

SIGMA, GUIDANCE = torch.tensor([0.7, 0.2]), 2.5


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def loaded(flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format="bf16")


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (2, 16, 12, 8), "prompt_embeds": (2, 20, 128), "pooled": (2, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def live_velocity(transformer: nn.Module) -> Tensor:
    with torch.no_grad():
        return velocity(transformer, **inputs(), sigma=SIGMA, guidance=GUIDANCE)


def native_velocity(model) -> Tensor:
    values = inputs()
    model.load(torch.device("cpu"))
    with torch.inference_mode():
        return model.model.diffusion_model(
            values["latents"],
            SIGMA,
            context=values["prompt_embeds"],
            y=values["pooled"],
            guidance=torch.full((2,), GUIDANCE),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_loader_and_ours_give_the_live_velocity(
    loaded: LoadedFlux, tmp_path: Path, kind: str
) -> None:
    before = loaded.store.content_hash()
    settings = KINDS[kind]
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    base = live_velocity(transformer)
    lora = trained_like(transformer, settings, loaded)
    live = live_velocity(transformer)
    save_lora(tmp_path / "lora.safetensors", file_tensors(lora.state(), settings), {})
    tensors = read_lora(tmp_path / "lora.safetensors")
    model = build_model(loaded, torch.float32)
    by_core, _ = comfy.sd.load_lora_for_models(model, None, dict(tensors), 1.0, 0.0)
    assert torch.max(torch.abs(live - base)) > 0.01
    assert torch.max(torch.abs(native_velocity(by_core) - live)) <= 1e-4
    assert torch.max(torch.abs(native_velocity(add_lora(model, tensors, 1.0)) - live)) <= 1e-4
    for format in FORMATS:
        if settings.kind == "lora" or format == "comfyui":
            other = exported(parse_flux_lora(tensors), format)
            added = native_velocity(add_lora(model, other, 1.0))
            # A DoRA for diffusers has the magnitudes that diffusers reads, and no others.
            if not (settings.dora and format == "diffusers"):
                assert torch.max(torch.abs(added - live)) <= 1e-4
    assert loaded.store.content_hash() == before


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_loftq_lora_acts_on_the_format_it_was_trained_on(flux_file: Path, format: str) -> None:
    """From its start on it brings the quantized network nearer to the original."""
    base, original = load_flux(flux_file, format=format), load_flux(flux_file, format="bf16")
    transformer = build_transformer(base.store, base.config, torch.float32)
    quantized = live_velocity(transformer)
    settings = LoraSettings(rank=32, init="loftq", targets="ai-toolkit")
    lora = attach_lora(transformer, settings, seed=0, base=base)
    live = live_velocity(transformer)
    tensors = file_tensors(lora.state(), settings)
    model = add_lora(build_model(base, torch.float32), tensors, 1.0)
    assert torch.max(torch.abs(native_velocity(model) - live)) <= 1e-4
    wanted = live_velocity(build_transformer(original.store, original.config, torch.float32))
    assert (live - wanted).norm() < 0.95 * (quantized - wanted).norm()
