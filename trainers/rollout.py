"""Scheduled sampling: noisy latents that the network's own steps led to (Bengio et al. 2015; for
diffusion Ning et al. 2023), in the form that SimpleTuner gives it.

A sample that is trained at sigma begins some timesteps before, on the straight path, and goes to
sigma by Euler steps of the network itself. What it learns there is the velocity of the straight
path still, which leads back to it. Shapes: B batch, C latent channels, H W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .flow import add_noise
from .flow_settings import NUM_TIMESTEPS, RolloutSettings

STEP = 1 / NUM_TIMESTEPS
"""The change of sigma in an Euler step: one timestep."""


def probability(settings: RolloutSettings, step: int) -> float:
    """Share of the samples with a rollout at an optimizer step, counted from 0."""
    done = min(1.0, step / settings.ramp_steps) if settings.ramp_steps else 1.0
    if settings.ramp == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    start = settings.start_probability
    return start + (settings.probability - start) * done


def draw_offsets(
    settings: RolloutSettings, sigma: Tensor, *, step: int, generator: torch.Generator
) -> Tensor:
    """How many timesteps before `sigma` [B] each sample begins, [B] whole numbers; none begins
    before pure noise."""
    is_kept = torch.rand(len(sigma), generator=generator) < probability(settings, step)
    u, most = torch.rand(len(sigma), generator=generator), settings.max_offset
    match settings.offsets:
        case "early":
            offsets = (u.square() * most).round()
        case "late":
            offsets = ((1 - u.square()) * most).round()
        case _:
            offsets = (u * (most + 1)).floor()
    room = ((1 - sigma) / STEP + 1e-3).floor()  # sigmas are float32: 0.9 is 99.99998 steps from 1
    return torch.minimum(offsets * is_kept, room).long()


@torch.no_grad()
def roll_out(
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    offsets: Tensor,
    velocity: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The noisy latents [B, C, H, W] at `sigma` [B], begun `offsets` [B] timesteps before it.

    Args:
        velocity: the network's, [B, C, H, W], at noisy latents and sigmas [B]. It is called as
            often as the largest offset says; a sample with a smaller one waits meanwhile.
    """
    offsets = offsets.to(sigma)
    noisy = add_noise(latents, noise, sigma + offsets * STEP)
    for left in range(int(offsets.max()), 0, -1):
        by = STEP * (left <= offsets).to(noisy).view(-1, 1, 1, 1)
        noisy = noisy - by * velocity(noisy, sigma + offsets.clamp(max=left) * STEP).float()
    return noisy
