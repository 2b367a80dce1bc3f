"""What an error costs: loss functions, and weights by the share of noise.

sigma is 0 for the picture and 1 for noise; losses are [B], means over channels and places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .config import require
from .flow import NUM_TIMESTEPS

LOSSES = ("mse", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
LOSS_WEIGHTS = ("none", "sigma_sqrt", "cosmap", "bell")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """How errors are counted."""

    loss: str = "mse"
    """mse: squares. huber, smooth_l1: squares of small errors and sizes of large ones, so that a
    bad picture counts less; huber falls with huber_c, smooth_l1 does not."""
    huber_c: float = 0.1
    """Where huber and smooth_l1 turn from squares to sizes."""
    huber_schedule: str = "constant"
    """How that moves with the noise: exponential and snr begin at 1 without noise."""
    weight: str = "none"
    """How much each sigma counts. sigma_sqrt: detail far more. cosmap: the middle a little more.
    bell: the middle most, both ends hardly."""

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("loss", self.loss, LOSSES),
            ("Huber schedule", self.huber_schedule, HUBER_SCHEDULES),
            ("loss weight", self.weight, LOSS_WEIGHTS),
        ):
            require(value in known, f"Unknown {kind} '{value}'. Choose one of: {', '.join(known)}.")
        require(
            0 < self.huber_c <= 1, f"The setting huber_c must be in 0 to 1, got {self.huber_c}."
        )


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
