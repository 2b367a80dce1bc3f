"""The MODEL face: the host's own network over the store (DESIGN I1, I2, I4)."""

from __future__ import annotations

from pathlib import Path

import comfy.sample
import comfy.sd
import pytest
import torch
from atelier.nodes import host
from atelier.nodes.linear import PlacedLoras
from atelier.nodes.loaders import LoadQuantizedFlux
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora
from atelier.nodes.trainable import base_flux
from atelier.trainers.adapters import attach_lora, file_tensors
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_settings import LoraSettings
from drawing import draw
from flux_files import write_flux
from lora_files import lora_tensors

FLOAT32 = torch.float32
SIGMA = torch.tensor([0.7, 0.2])
GUIDANCE = 2.5


def inputs(loaded: LoadedFlux, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    config = loaded.config
    return {
        "latents": draw(2, 16, 12, 8),
        "prompt_embeds": draw(2, 20, config.context_dim),
        "pooled": draw(2, config.vector_dim),
    }


def native_velocity(model, latents, prompt_embeds, pooled) -> torch.Tensor:
    model.load(torch.device("cpu"))
    with torch.inference_mode():
        return model.model.diffusion_model(
            latents, SIGMA, context=prompt_embeds, y=pooled, guidance=torch.full((2,), GUIDANCE)
        )


def training_velocity(transformer, latents, prompt_embeds, pooled) -> torch.Tensor:
    with torch.no_grad():
        return velocity(
            transformer,
            latents,
            sigma=SIGMA,
            prompt_embeds=prompt_embeds,
            pooled=pooled,
            guidance=GUIDANCE,
        )


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=2, depth_single=2)


@pytest.fixture(params=list(FORMATS))
def loaded(request: pytest.FixtureRequest, flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format=request.param)


def trained_like(transformer, settings: LoraSettings):
    """A LoRA with values as if it had been trained."""
    lora = attach_lora(transformer, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return lora


def test_both_faces_give_the_same_velocity(loaded: LoadedFlux) -> None:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    model = build_model(loaded, torch.float32)
    values = inputs(loaded)
    native, training = native_velocity(model, **values), training_velocity(transformer, **values)
    assert torch.max(torch.abs(native - training)) <= 1e-5


LORAS_ON = {
    "one": [("plain", 0.7)],
    "negative": [("without_alpha", -1.3)],
    "two on the same rows": [("plain", 0.7), ("without_alpha", -1.3)],
    "the same twice": [("plain", 1.5), ("plain", -0.5)],
    "every kind of name": [("plain", 1.0), ("final_layer", 0.8), ("original_final_layer", -0.6)],
}


@pytest.mark.parametrize("name", LORAS_ON)
def test_both_faces_give_the_same_velocity_with_loras_on_the_model(
    loaded: LoadedFlux, name: str
) -> None:
    before = loaded.store.content_hash()
    model, values = build_model(loaded, torch.float32), inputs(loaded)
    plain = native_velocity(model, **values)
    for kind, strength in LORAS_ON[name]:
        model = add_lora(model, lora_tensors(kind), strength)
    base = base_flux(model)
    assert base.frozen
    transformer = build_transformer(base.store, base.config, torch.float32, base.frozen)
    native, training = native_velocity(model, **values), training_velocity(transformer, **values)
    assert torch.max(torch.abs(native - plain)) > 0.01
    assert torch.max(torch.abs(native - training)) <= 1e-5
    assert loaded.store.content_hash() == before


def test_a_lora_of_strength_0_is_none(flux_file: Path) -> None:
    model = build_model(load_flux(flux_file, format="bf16"), torch.float32)
    assert base_flux(add_lora(model, lora_tensors("plain"), 0.0)).frozen == ()


def test_both_faces_share_the_bytes_of_every_block_matrix(loaded: LoadedFlux) -> None:
    model = build_model(loaded, torch.float32)
    network = model.model.diffusion_model
    for name, packed in loaded.store.packed.items():
        module = network.get_submodule(name.removesuffix(".weight"))
        assert module.weight.data_ptr() == packed.data.data_ptr()


@pytest.mark.parametrize("targets", ["qlora", "all", "all+ffs"])
def test_a_live_lora_equals_its_file_through_the_core_loader(
    loaded: LoadedFlux, targets: str
) -> None:
    settings = LoraSettings(rank=4, alpha=2.0, targets=targets)
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    values = inputs(loaded)
    base = training_velocity(transformer, **values)
    lora = trained_like(transformer, settings)
    live = training_velocity(transformer, **values)
    model = build_model(loaded, torch.float32)
    patched, _ = comfy.sd.load_lora_for_models(
        model, None, file_tensors(lora.state(), settings), 1.0, 0.0
    )
    assert torch.max(torch.abs(live - base)) > 0.01
    assert torch.max(torch.abs(native_velocity(patched, **values) - live)) <= 1e-4


def test_base_bytes_survive_a_lora_on_and_off(loaded: LoadedFlux) -> None:
    before = loaded.store.content_hash()
    model, values = build_model(loaded, torch.float32), inputs(loaded)
    plain = native_velocity(model, **values)
    settings = LoraSettings(rank=4)
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    tensors = file_tensors(trained_like(transformer, settings).state(), settings)
    native_velocity(add_lora(model, tensors, -0.7), **values)
    assert loaded.store.content_hash() == before
    assert torch.equal(native_velocity(model, **values), plain)


def test_comfyui_samples_with_and_without_a_lora(loaded: LoadedFlux) -> None:
    before = loaded.store.content_hash()
    model = build_model(loaded, torch.float32)
    config = loaded.config
    positive = [
        [
            torch.randn(1, 20, config.context_dim),
            {"pooled_output": torch.randn(1, config.vector_dim)},
        ]
    ]
    settings = LoraSettings(rank=4)
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    tensors = file_tensors(trained_like(transformer, settings).state(), settings)
    with torch.inference_mode():
        plain = draw(model, positive, steps=2)
        patched = draw(add_lora(model, tensors, 1.0), positive, steps=2)
        again = draw(model, positive, steps=2)
    assert not torch.equal(plain, patched)
    assert torch.equal(plain, again)
    assert loaded.store.content_hash() == before


def test_fp8_is_refused_on_apples_gpus_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compute_device", lambda: torch.device("mps"))
    with pytest.raises(ValueError, match=r"^Apple's GPUs cannot hold weights in fp8\. "):
        LoadQuantizedFlux.execute("a file that is not there", "fp8", "auto")


def test_a_model_in_fp8_is_refused_on_apples_gpus_before_it_is_moved(flux_file: Path) -> None:
    model = build_model(load_flux(flux_file, format="fp8"), torch.float32)
    before = model.store.content_hash()
    for load in (model.load, model.partially_load):
        with pytest.raises(ValueError, match=r"^Apple's GPUs cannot hold weights in fp8\. "):
            load(torch.device("mps"))
    assert model.store.device == model.current_loaded_device() == torch.device("cpu")
    assert model.store.content_hash() == before


def test_another_model_as_a_lora_is_reached_at_full_strength(tmp_path: Path) -> None:
    """As a hook of ComfyUI's Create Hook Model as LoRA has it: the patch holds the other weight."""
    model = build_model(load_flux(write_flux(tmp_path / "a.safetensors"), format="nf4"), FLOAT32)
    linear = model.model.diffusion_model.single_blocks[0].linear2
    other = torch.randn(*linear.packed.shape, generator=torch.Generator().manual_seed(0))
    for strength in (1.0, 0.25):
        patch = (strength, ("model_as_lora", (other,)), 1.0, None, None)
        linear.set_patches([patch], [], PlacedLoras())
        own = linear.packed.dequantize(torch.float32)
        expected = torch.lerp(own, other, strength).to(torch.bfloat16)
        torch.testing.assert_close(linear.patched_weight(), expected)
