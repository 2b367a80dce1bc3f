"""Which shares of noise a training sees: distributions of sigma, and their shifts.

sigma is 0 for the picture and 1 for noise. Names and formulas are those of sd-scripts, SimpleTuner,
ai-toolkit and diffusers; where they disagree the docstrings say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import require
from .flow import NUM_TIMESTEPS, sample_sigmas

TIMESTEP_SAMPLING = (
    "uniform",
    "logit_normal",
    "mode",
    "sigmoid",
    "shift",
    "flux_shift",
    "beta",
    "content",
    "style",
    "balanced",
    "fast",
    "custom",
)
SIGMA_MIN = 1 / NUM_TIMESTEPS
"""The smallest sigma of diffusers' table; below it weights of the loss would grow without limit."""
FAST = (1.0,) * 7 + (0.75, 0.5, 0.25)
"""SimpleTuner's `flux_fast_schedule`: the four steps in which schnell samples, the first most."""


@dataclass(frozen=True, kw_only=True)
class TimestepSettings:
    """How the sigma of each sample is drawn."""

    sampling: str = "uniform"
    """uniform and balanced: all alike. logit_normal, sigmoid, mode, beta: the middle more often.
    shift, flux_shift: sigmoid with one of both shifts. content: much noise more often, which is
    composition; style: little noise. fast: schnell's four steps. custom: a list."""
    shift: float = 0.0
    """Moves all draws: above 1 towards noise, below 1 towards detail; 0 or 1 does nothing."""
    auto_shift: bool = False
    """The shift that FLUX.1-dev samples with: larger for larger pictures, 3.16 at 1024x1024."""
    logit_mean: float = 0.0
    """logit_normal: above 0 more noise. (diffusers' scripts count the other way round.)"""
    logit_std: float = 1.0
    """logit_normal: a smaller value stays nearer to the middle."""
    mode_scale: float = 1.29
    """mode: SD3's s; above 0 the middle, below 0 the ends more often."""
    sigmoid_scale: float = 1.0
    """sigmoid, shift and flux_shift: a larger value goes more often to both ends."""
    beta_alpha: float = 2.0
    """beta: its first parameter; larger than the second one leads to noise."""
    beta_beta: float = 2.0
    custom: tuple[float, ...] = ()
    """custom: sigmas up to 1, or timesteps up to 1000, each as often as it stands here."""

    def __post_init__(self) -> None:
        require(
            self.sampling in TIMESTEP_SAMPLING,
            f"Unknown timestep sampling '{self.sampling}'. Choose one of: "
            f"{', '.join(TIMESTEP_SAMPLING)}.",
        )
        require(
            0 <= self.shift <= 100,
            f"The timestep shift must be between 0 (off) and 100, got {self.shift}. 3 is usual.",
        )
        require(
            not (self.shift and self.auto_shift),
            f"There are two timestep shifts: {self.shift} and the automatic one. Set the first to "
            "0, or turn the second off.",
        )
        require(
            self.sampling != "shift" or self.shift > 0,
            "The timestep sampling 'shift' needs a shift above 0: 3.1582 is FLUX's at 1024x1024.",
        )
        require(
            self.sampling != "flux_shift" or not self.shift,
            "The timestep sampling 'flux_shift' finds its shift by the size of the pictures. Set "
            "the shift to 0, or choose 'shift'.",
        )
        for name in ("logit_std", "sigmoid_scale", "beta_alpha", "beta_beta"):
            value = getattr(self, name)
            require(value > 0, f"The setting {name} of the timesteps must be above 0, got {value}.")
        require(
            -1 <= self.mode_scale <= 1.75,  # outside of it the formula of SD3 is no distribution
            f"The mode scale must be between -1 and 1.75, got {self.mode_scale}.",
        )
        is_custom = self.sampling == "custom"
        require(
            bool(self.custom) or not is_custom,
            "The timestep sampling 'custom' needs a list, such as 1, 0.75, 0.5, 0.25.",
        )
        wrong = [value for value in self.custom if not 0 < value <= NUM_TIMESTEPS]
        require(
            not wrong,
            f"Custom timesteps are sigmas up to 1 or timesteps up to {NUM_TIMESTEPS}, all above 0, "
            f"got {wrong[:1]}.",
        )


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
