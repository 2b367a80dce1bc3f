"""Flow matching: timesteps, noising, target and loss, as in rectified flow.

Shapes: B batch, C channels, H W latent size. sigma is the share of noise: 0 picture, 1 noise.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


def seeded(seed: int, *purpose: int | str) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose…).

    Every random number of a run comes from one of these, keyed for example by the micro-step, so
    that there is no random state to save and any step can be replayed.
    """
    key = "/".join(str(part) for part in (seed, *purpose))
    state = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(state & (2**63 - 1))


def sample_sigmas(batch_size: int, generator: torch.Generator) -> Tensor:
    """sigma [B], uniform over diffusers' table 1.000, 0.999, … 0.001 (its weighting "none")."""
    index = (torch.rand(batch_size, generator=generator) * NUM_TIMESTEPS).long()
    return 1 - index / NUM_TIMESTEPS


def add_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, sigma_B: Tensor) -> Tensor:
    """The point x_t = (1 - sigma) x_0 + sigma eps on the straight path to noise."""
    sigma = sigma_B.view(-1, 1, 1, 1)
    return (1 - sigma) * latents_BCHW + sigma * noise_BCHW


def flow_loss(velocity_BCHW: Tensor, latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Mean squared error [B] of a predicted velocity against eps - x_0, in float32."""
    return squared_error(velocity_BCHW, flow_target(latents_BCHW, noise_BCHW))


def flow_target(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity eps - x_0 of the straight path, in float32."""
    return noise_BCHW.float() - latents_BCHW.float()


def squared_error(
    velocity_BCHW: Tensor, target_BCHW: Tensor, weights_B1HW: Tensor | None = None
) -> Tensor:
    """Mean squared error [B], in float32.

    `weights` in 0..1 multiply the error of each latent; the mean is still over all of them, so a
    picture counts by the area of its mask.
    """
    error = (velocity_BCHW.float() - target_BCHW.float()).square()
    if weights_B1HW is not None:
        error = error * weights_B1HW
    return error.flatten(1).mean(1)
