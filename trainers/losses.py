"""What an error costs: loss functions, and weights by the share of noise.

sigma is 0 for the picture and 1 for noise; losses are [B], means over channels and places.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .flow_settings import NUM_TIMESTEPS, LossSettings


def training_loss(
    settings: LossSettings,
    prediction: Tensor,
    target: Tensor,
    sigma_B: Tensor,
    weights_B1HW: Tensor | None = None,
) -> Tensor:
    """The loss [B] of predicted velocities, in float32.

    `weights` in 0..1 multiply the loss of each latent; the mean is still over all of them, so a
    picture counts by the area of its mask.
    """
    values = pointwise_loss(settings, prediction.float() - target.float(), sigma_B)
    if weights_B1HW is not None:
        values = values * weights_B1HW
    return loss_weight(settings.weight, sigma_B) * values.flatten(1).mean(1)


def pointwise_loss(settings: LossSettings, error: Tensor, sigma_B: Tensor) -> Tensor:
    """The loss of each value of `error` [B, ...], the difference of prediction and target."""
    if settings.loss == "mse":
        return error.square()
    c = huber_c(settings, sigma_B).view(-1, *[1] * (error.ndim - 1))
    root = torch.sqrt(error.square() + c.square()) - c
    return 2 * c * root if settings.loss == "huber" else 2 * root


def huber_c(settings: LossSettings, sigma_B: Tensor) -> Tensor:
    """c [B] of the pseudo-Huber loss at each sigma (sd-scripts' three schedules; snr with the
    noise-to-signal ratio sigma / (1 - sigma) of the straight path)."""
    c = settings.huber_c
    match settings.huber_schedule:
        case "exponential":
            return torch.exp(sigma_B * math.log(c))
        case "snr":
            return (1 - c) * (1 - sigma_B).square() + c
        case _:
            return torch.full_like(sigma_B, c)


def loss_weight(kind: str, sigma_B: Tensor) -> Tensor:
    """What the loss at each sigma [B] is multiplied by: a name of LOSS_WEIGHTS.

    sigma_sqrt is sigma^-2 and cosmap 2 / (pi (1 - 2 sigma + 2 sigma^2)), as in diffusers; bell is
    ai-toolkit's and DiffSynth's exp(-2 (sigma - 1/2)^2) less its smallest value, with a mean of 1.
    """
    match kind:
        case "sigma_sqrt":
            return sigma_B**-2.0
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma_B + 2 * sigma_B.square()))
        case "bell":
            lowest, mean = _bell_range()
            return (_bell(sigma_B) - lowest) / mean
        case _:
            return torch.ones_like(sigma_B)


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * (sigma - 0.5).square())


@cache
def _bell_range() -> tuple[float, float]:
    """Its smallest value over the timesteps 1..1000, and the mean of what is above it."""
    values = _bell(torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64) / NUM_TIMESTEPS)
    lowest = float(values.min())
    return lowest, float((values - lowest).mean())
