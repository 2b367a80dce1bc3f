"""What a micro-step draws at random beside its pictures and texts.

Shapes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainSettings
from .flow import add_noise
from .timesteps import draw_sigmas


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """Where on the way from pictures to noise a micro-step trains."""

    noise: Tensor
    """[B, C, H, W]"""
    sigma: Tensor
    """[B], the share of noise."""
    noisy: Tensor
    """[B, C, H, W], what the network is given."""


def draw(settings: TrainSettings, latents: Tensor, generator: torch.Generator) -> Draw:
    """Noise and sigmas for `latents` [B, C, H, W], on their device; drawn on the CPU."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    height, width = latents.shape[-2:]
    sigma = draw_sigmas(
        settings.flow.timesteps,
        len(latents),
        num_tokens=height * width // 4,
        generator=generator,
    ).to(latents.device)
    return Draw(noise=noise, sigma=sigma, noisy=add_noise(latents, noise, sigma))
