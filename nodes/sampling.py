"""ComfyUI's own sampling: prompts as CLIP Text Encode makes them, latents as of KSampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ..trainers.flux import LATENT_CHANNELS
from .validation import Sampler

SAMPLERS: tuple[str, ...] = tuple(comfy.samplers.KSampler.SAMPLERS)
SCHEDULERS: tuple[str, ...] = tuple(comfy.samplers.KSampler.SCHEDULERS)


def encode_prompt(clip: Any, text: str, guidance: float) -> list:
    """The CONDITIONING that CLIP Text Encode and FluxGuidance give for a prompt."""
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [[embeds, {**options, "guidance": guidance}] for embeds, options in conditioning]


def draw_latents(
    model: Any,
    positive: list,
    negative: list,
    *,
    width: int,
    height: int,
    sampler: Sampler,
    show: Callable[[Image.Image], None],
) -> Tensor:
    """Latents [1, 16, height/8, width/8] drawn as KSampler does.

    Args:
        show: called after each step with a small picture of the latents without their noise.
    """
    previewer = _previewer(model)

    def after_step(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        _, picture, _ = previewer.decode_latent_to_preview_image("JPEG", x0)
        show(picture)

    empty = torch.zeros(1, LATENT_CHANNELS, height // 8, width // 8)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, sampler.seed),
        sampler.steps,
        sampler.cfg,
        sampler.name,
        sampler.scheduler,
        positive,
        negative,
        empty,
        callback=after_step,
        disable_pbar=True,
        seed=sampler.seed,
    )


def _previewer(model: Any) -> Any:
    """The one that the user chose for all samplers, else the quick one, which needs no file."""
    latent_format = model.model.latent_format
    chosen = latent_preview.get_previewer(model.load_device, latent_format)
    return chosen or latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
