"""Which shares of noise a training sees: distributions of sigma, and their shifts.

sigma is 0 for the picture and 1 for noise. Names and formulas are those of sd-scripts, SimpleTuner,
ai-toolkit and diffusers; where they disagree the docstrings say so.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .flow import sample_sigmas
from .flow_settings import NUM_TIMESTEPS, TimestepSettings

SIGMA_MIN = 1 / NUM_TIMESTEPS
"""The smallest sigma of diffusers' table; below it weights of the loss would grow without limit."""
FAST = (1.0,) * 7 + (0.75, 0.5, 0.25)
"""SimpleTuner's `flux_fast_schedule`: the four steps in which schnell samples, the first most."""


def draw_sigmas(
    settings: TimestepSettings, batch_size: int, *, num_tokens: int, generator: torch.Generator
) -> Tensor:
    """sigma [B] in SIGMA_MIN..1.

    Args:
        num_tokens: of a picture, a quarter of its latents, by which the automatic shift goes.
    """
    sigma = _base(settings, batch_size, generator)
    is_automatic = settings.auto_shift or settings.sampling == "flux_shift"
    by = flux_shift(num_tokens) if is_automatic else settings.shift
    return (shifted(sigma, by) if by else sigma).clamp(SIGMA_MIN, 1.0)


def shifted(sigma: Tensor, by: float) -> Tensor:
    """by * sigma / (1 + (by - 1) * sigma), the shift of SD3 (Esser et al. 2024, eq. 23)."""
    return by * sigma / (1 + (by - 1) * sigma)


def flux_shift(num_tokens: int) -> float:
    """exp(mu) of FLUX's sampler: mu is 0.5 at 256 tokens and 1.15 at 4096, on a straight line."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + slope * (num_tokens - 256))


def _base(settings: TimestepSettings, batch_size: int, generator: torch.Generator) -> Tensor:
    """Before any shift."""

    def uniform() -> Tensor:
        return torch.rand(batch_size, generator=generator)

    def normal() -> Tensor:
        return torch.randn(batch_size, generator=generator)

    match settings.sampling:
        case "uniform" | "balanced":
            return sample_sigmas(batch_size, generator)
        case "logit_normal":
            return torch.sigmoid(settings.logit_mean + settings.logit_std * normal())
        case "sigmoid" | "shift" | "flux_shift":
            return torch.sigmoid(settings.sigmoid_scale * normal())
        case "mode":
            u = uniform()
            bend = torch.cos(math.pi / 2 * u).square() - 1 + u
            return 1 - u - settings.mode_scale * bend
        case "beta":
            return _beta(settings.beta_alpha, settings.beta_beta, batch_size, generator)
        case "content":
            return 1 - uniform() ** 3
        case "style":
            return uniform() ** 3
        case _:
            values = torch.tensor(FAST if settings.sampling == "fast" else settings.custom)
            scale = NUM_TIMESTEPS if float(values.max()) > 1 else 1
            return values[(uniform() * len(values)).long()] / scale


def _beta(alpha: float, beta: float, batch_size: int, generator: torch.Generator) -> Tensor:
    """Beta(alpha, beta) as a share of two gamma variables."""
    sizes = (torch.full((batch_size,), value, dtype=torch.float64) for value in (alpha, beta))
    first, second = (torch._standard_gamma(size, generator=generator) for size in sizes)
    return (first / (first + second)).float()
