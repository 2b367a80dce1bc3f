"""Streamed blocks behind the host's patcher: little memory is told to it as ComfyUI tells it.

On a CPU ComfyUI never limits a model, so the tests call the patcher with small budgets, or give the
sampler's own call such a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import comfy.model_management
import drawing
import pytest
import torch
from atelier.nodes.native import (
    StorePatcher,
    build_model,
    to_training_device,
)
from atelier.nodes.native_lora import add_lora
from atelier.trainers.adapters import attach_lora, file_tensors
from atelier.trainers.flux import build_transformer, recompute_blocks, velocity
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.packed_copy import PackedCopies
from flux_files import write_flux
from torch import Tensor

CPU = torch.device("cpu")
LORA = LoraSettings(rank=4)


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth=2, depth_single=4)


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()


def model_of(flux_file: Path, streaming: str = "auto", folder: Path | None = None) -> StorePatcher:
    copies = PackedCopies(folder) if folder else None
    loaded = load_flux(flux_file, format="nf4", streaming=streaming, copies=copies)
    model = build_model(loaded, torch.float32)
    model.offload_device = torch.device("cpu", 0)  # not the load device, as on a GPU
    return model


def drawn(model: StorePatcher) -> Tensor:
    """What a KSampler draws."""
    generator = torch.Generator().manual_seed(0)
    config = model.model.atelier.config
    embeds = torch.randn(1, 20, config.context_dim, generator=generator)
    pooled = torch.randn(1, config.vector_dim, generator=generator)
    positive = [[embeds, {"pooled_output": pooled}]]
    with torch.inference_mode():
        return drawing.draw(model, positive, steps=2)


@pytest.fixture(scope="module")
def expected(flux_file: Path) -> Tensor:
    return drawn(model_of(flux_file, "off"))


@pytest.fixture
def vram(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what ComfyUI lets the next models that it loads take of the device."""
    load = comfy.model_management.LoadedModel.model_load

    def limit(free_bytes: float) -> None:
        def limited(self, lowvram_model_memory=0, force_patch_weights=False):
            # As load_models_gpu computes it: what is free now, less what the model has already.
            return load(self, free_bytes - self.model_loaded_memory(), force_patch_weights)

        monkeypatch.setattr(comfy.model_management.LoadedModel, "model_load", limited)

    return limit


def part_of(model: StorePatcher, part: float) -> float:
    return part * model.store.num_bytes


@pytest.mark.parametrize("part", [0.4, 0.75, 0.9])
def test_a_small_budget_is_kept_and_said(flux_file: Path, part: float) -> None:
    model = model_of(flux_file)
    model.load(CPU, lowvram_model_memory=part_of(model, part))
    assert model.store.stream
    least = model_of(flux_file)
    least.load(CPU, lowvram_model_memory=0.1)
    assert model.loaded_size() <= max(part_of(model, part), least.loaded_size())
    assert model.loaded_size() == model.store.resident_bytes < model.model_size()


def test_more_memory_brings_more_blocks_and_less_takes_them_away(
    flux_file: Path, expected: Tensor
) -> None:
    model = model_of(flux_file)
    model.load(CPU, lowvram_model_memory=0.1)
    least = model.loaded_size()
    added = model.partially_load(CPU, part_of(model, 0.5))
    assert 0 < added <= part_of(model, 0.5)
    assert model.loaded_size() == least + added
    freed = model.partially_unload(model.offload_device, 1 << 20)
    assert 1 << 20 <= freed < model.store.num_bytes / 2
    assert model.loaded_size() == least + added - freed
    before = model.loaded_size()
    assert model.partially_load(CPU, 1e32) == model.store.num_bytes - before
    assert model.loaded_size() == model.model_size() == model.store.num_bytes
    assert torch.equal(drawn(model), expected)


def test_what_cannot_be_freed_is_not_said_to_be(flux_file: Path) -> None:
    model = model_of(flux_file)
    model.load(CPU, lowvram_model_memory=0.1)
    size = model.loaded_size()
    assert model.partially_unload(model.offload_device, size - 1) == 0
    assert model.loaded_size() == size
    model.detach()
    assert model.loaded_size() == 0
    assert model.store.device == model.offload_device


@pytest.mark.parametrize("part", [0.0, 0.8, 2.0])
def test_a_sampler_with_little_memory_draws_the_same(
    flux_file: Path, expected: Tensor, vram: Callable[[float], None], part: float
) -> None:
    model = model_of(flux_file)
    before = model.store.content_hash()
    vram(part_of(model, part))
    assert torch.equal(drawn(model), expected)
    assert (model.store.stream is None) == (part > 1)
    assert model.store.content_hash() == before


@pytest.mark.parametrize("streaming", ["ram", "disk"])
def test_a_sampler_with_all_blocks_streamed_draws_the_same(
    flux_file: Path, expected: Tensor, tmp_path: Path, streaming: str
) -> None:
    model = model_of(flux_file, streaming, tmp_path)
    assert torch.equal(drawn(model), expected)
    assert model.store.stream
    assert model.loaded_size() == model.model_size() < model.store.num_bytes
    comfy.model_management.unload_all_models()
    assert model.loaded_size() == 0
    assert torch.equal(drawn(model), expected)


def lora_of(loaded: LoadedFlux) -> dict[str, Tensor]:
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = attach_lora(transformer, LORA, seed=1)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.copy_(0.05 * torch.randn(parameter.shape))
    return file_tensors(lora.state(), LORA)


def test_a_changed_strength_moves_no_block(
    flux_file: Path, expected: Tensor, vram: Callable[[float], None]
) -> None:
    model = model_of(flux_file)
    tensors = lora_of(model.model.atelier)
    vram(part_of(model, 0.8))
    drawn(model)
    moved, stream = model.store.bytes_moved, model.store.stream
    for strength in (0.2, 0.9, -1.0):
        assert not torch.equal(drawn(add_lora(model, tensors, strength)), expected)
    assert model.store.bytes_moved == moved
    assert model.store.stream is stream
    assert torch.equal(drawn(model), expected)


def test_training_and_sampling_take_turns(
    flux_file: Path, expected: Tensor, vram: Callable[[float], None]
) -> None:
    model = model_of(flux_file)
    loaded = model.model.atelier

    def gradients() -> list[Tensor]:
        transformer = build_transformer(loaded.store, loaded.config, torch.float32).train()
        lora = attach_lora(transformer, LORA, seed=1)
        with torch.no_grad():
            for parameter in lora.parameters.values():
                parameter.fill_(0.01)
        recompute_blocks(transformer)
        velocity(
            transformer,
            torch.ones(1, 16, 4, 4),
            sigma=torch.tensor([0.5]),
            prompt_embeds=torch.ones(1, 6, loaded.config.context_dim),
            pooled=torch.ones(1, loaded.config.vector_dim),
            guidance=1.0,
        ).square().mean().backward()
        return [p.grad for p in lora.parameters.values() if p.grad is not None]

    whole = gradients()
    for training, sampling in ((0.0, 0.8), (0.8, 2.0), (2.0, 0.0), (0.0, 0.0)):
        vram(part_of(model, training))
        with torch.inference_mode():
            to_training_device(model, 0)
        assert all(torch.equal(a, b) for a, b in zip(gradients(), whole, strict=True))
        vram(part_of(model, sampling))
        assert torch.equal(drawn(model), expected)
