"""What a micro-step draws at random beside its pictures and texts.

Noise and sigmas come from the micro-step's own generator, whatever else is drawn: a setting that is
turned on leaves them as they were. Shapes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainSettings
from .flow import add_noise, seeded
from .flow_settings import FlowSettings
from .flux import FluxConfig
from .rollout import draw_offsets, roll_out
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
    guidance: Tensor
    """[B], what a guidance-distilled network is given besides."""


def draw(
    settings: TrainSettings,
    latents: Tensor,
    generator: torch.Generator,
    micro_step: int,
    predict: Callable[[Draw], Tensor],
) -> Draw:
    """Noise, sigmas and guidance for `latents` [B, C, H, W], on their device; drawn on the CPU.

    Args:
        generator: of noise and sigmas.
        predict: the network's velocity [B, C, H, W], for rollouts.
    """
    noise = torch.randn(latents.shape, generator=generator)
    height, width = latents.shape[-2:]
    sigma = draw_sigmas(
        settings.flow.timesteps,
        len(latents),
        num_tokens=height * width // 4,
        generator=generator,
    ).to(latents.device)
    noise = _offset(settings, noise, micro_step).to(latents.device)
    drawn = Draw(
        noise=noise,
        sigma=sigma,
        noisy=add_noise(latents, noise, sigma),
        guidance=_guidance(settings, len(latents), micro_step).to(latents.device),
    )
    return _rolled_out(settings, latents, drawn, micro_step, predict)


def trained_config(config: FluxConfig, settings: FlowSettings) -> FluxConfig:
    """The network that is trained: without its guidance embedding where that is bypassed, so that
    the conditioning is the sum of the embeddings of time and of the pooled text."""
    guidance = config.guidance and not settings.bypass_guidance
    return dataclasses.replace(config, guidance=guidance)


def _offset(settings: TrainSettings, noise: Tensor, micro_step: int) -> Tensor:
    """`noise` and a constant for each sample and channel, which the velocity to learn has too."""
    by = settings.flow.noise_offset
    if not by:
        return noise
    generator = seeded(settings.seed, "noise offset", micro_step)
    return noise + by * torch.randn(*noise.shape[:2], 1, 1, generator=generator)


def _guidance(settings: TrainSettings, batch_size: int, micro_step: int) -> Tensor:
    low, high = settings.guidance, settings.flow.guidance_max
    if not high:
        return torch.full((batch_size,), low)
    shares = torch.rand(batch_size, generator=seeded(settings.seed, "guidance", micro_step))
    return low + (high - low) * shares


def _rolled_out(
    settings: TrainSettings,
    latents: Tensor,
    drawn: Draw,
    micro_step: int,
    predict: Callable[[Draw], Tensor],
) -> Draw:
    rollout = settings.flow.rollout
    if not rollout.max_offset:
        return drawn
    offsets = draw_offsets(
        rollout,
        drawn.sigma.cpu(),
        step=micro_step // settings.gradient_accumulation,
        generator=seeded(settings.seed, "rollout", micro_step),
    )

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        return predict(dataclasses.replace(drawn, noisy=noisy, sigma=sigma))

    noisy = roll_out(latents, drawn.noise, drawn.sigma, offsets, velocity)
    return dataclasses.replace(drawn, noisy=noisy)
