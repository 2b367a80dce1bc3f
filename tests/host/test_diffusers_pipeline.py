"""diffusers' own FluxPipeline draws with our LoRA what ComfyUI draws with our MODEL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from atelier.nodes.native import build_model
from atelier.nodes.sampling import encode_prompt
from atelier.trainers.adapters import attach_lora, file_tensors, save_lora
from atelier.trainers.flux import build_transformer, pack_latents
from atelier.trainers.load import load_flux
from atelier.trainers.lora_settings import LoraSettings
from dense import dense_transformer
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from drawing import draw
from executor import NANO, forget_networks, nano_clip
from safetensors.torch import load_file

STEPS, SIDE, GUIDANCE, SEED = 6, 64, 3.0, 11


@pytest.fixture(scope="module", autouse=True)
def networks_are_forgotten() -> Iterator[None]:
    yield
    forget_networks()


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA as Train LoRA writes it, whose alpha is not its rank."""
    settings = LoraSettings(rank=4, alpha=2.0, targets="all+ffs")
    loaded = load_flux(NANO / "nano-flux.safetensors", format="bf16")
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = attach_lora(transformer, settings, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(path, file_tensors(lora.state(), settings), {})
    return path


def pipeline() -> FluxPipeline:
    """diffusers' own network with nano's weights, in float32, and Euler's steps."""
    tensors = load_file(NANO / "nano-flux.safetensors")
    transformer = dense_transformer({name: value.float() for name, value in tensors.items()})
    encoders = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # the sigmas are given
    return FluxPipeline(scheduler=scheduler, transformer=transformer, **encoders)


def drawn_by_diffusers(pipe: FluxPipeline, model: Any, positive: list) -> torch.Tensor:
    """Packed latents drawn along the sigmas and from the noise of ComfyUI."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, SIDE // 8, SIDE // 8), SEED)
    ((embeds, options),) = positive
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        height=SIDE,
        width=SIDE,
        sigmas=sigmas[:-1].tolist(),
        num_inference_steps=STEPS,
        guidance_scale=options["guidance"],
        latents=pack_latents(noise),
        prompt_embeds=embeds.float(),
        pooled_prompt_embeds=options["pooled_output"].float(),
        output_type="latent",
    ).images


def test_the_pipeline_draws_what_comfyui_draws(lora_file: Path) -> None:
    with torch.inference_mode():
        positive = encode_prompt(nano_clip(), "a red apple, flat colour icon", GUIDANCE)
    model = build_model(load_flux(NANO / "nano-flux.safetensors", format="bf16"), torch.float32)
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, load_file(lora_file), 1.0, 0.0)
    pipe, drawn = pipeline(), {}
    for name, ours in (("base", model), ("LoRA", with_lora)):
        if ours is with_lora:
            pipe.load_lora_weights(str(lora_file))
        latents = draw(ours, positive, steps=STEPS, seed=SEED, side=SIDE)
        drawn[name] = pack_latents(model.model.process_latent_in(latents))
        theirs = drawn_by_diffusers(pipe, model, positive)
        assert torch.max(torch.abs(drawn[name] - theirs)) <= 1e-3, name
    assert torch.max(torch.abs(drawn["LoRA"] - drawn["base"])) > 0.1
