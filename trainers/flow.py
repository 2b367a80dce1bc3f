"""Flow matching: timesteps, noising, target and loss, as in rectified flow.

Shapes: B batch, C channels, H W latent size. sigma is the share of noise: 0 picture, 1 noise.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from .flow_settings import NUM_TIMESTEPS


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
    error = velocity_BCHW.float() - flow_target(latents_BCHW, noise_BCHW)
    return error.square().flatten(1).mean(1)


def flow_target(latents_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """The velocity eps - x_0 of the straight path, in float32."""
    return noise_BCHW.float() - latents_BCHW.float()
