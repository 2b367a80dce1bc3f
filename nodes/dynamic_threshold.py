"""Dynamic thresholding of classifier-free guidance, as a pure function of two predictions.

The formulas are those of mcmonkeyprojects' sd-dynamic-thresholding (73e4e04): a strong guidance
(CFG) is brought back to the range that a weaker one (mimic) has. Imports torch only, so it can be
loaded by its path.

Shapes: B batch, C latent channels, N all places of a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Truncated constants are part of the published behaviour. Of the "half" modes none uses its whole
# range: 1 - cos(1) is 0.46.
_HALF_PI, _TWO_PI = 1.5707, 6.28318
_SHAPES: dict[str, Callable[[float, float], float]] = {
    "Constant": lambda frac, value: 1.0,
    "Linear Down": lambda frac, value: 1.0 - frac,
    "Cosine Down": lambda frac, value: math.cos(_HALF_PI * frac),
    "Half Cosine Down": lambda frac, value: math.cos(frac),
    "Linear Up": lambda frac, value: frac,
    "Cosine Up": lambda frac, value: 1.0 - math.cos(_HALF_PI * frac),
    "Half Cosine Up": lambda frac, value: 1.0 - math.cos(frac),
    "Power Up": lambda frac, value: _power(frac, value),
    "Power Down": lambda frac, value: 1.0 - _power(frac, value),
    "Linear Repeating": lambda frac, value: abs(2.0 * (frac * value % 1.0) - 1.0),
    "Cosine Repeating": lambda frac, value: (1.0 + math.cos(_TWO_PI * frac * value)) / 2.0,
    "Sawtooth": lambda frac, value: frac * value % 1.0,
}
MODES: tuple[str, ...] = tuple(_SHAPES)
"""How a scale moves from the first step to the last."""
STARTPOINTS = ("MEAN", "ZERO")
"""Around what a prediction is brought back: the mean of each channel, or zero."""
MEASURES = ("AD", "STD")
"""What its range is: the largest absolute difference, or the standard deviation."""


def _power(frac: float, value: float) -> float:
    """frac ** value, and 0 where that is no real number: models that count timesteps from 1000
    begin at a place of -0.001."""
    return frac**value if frac >= 0 or float(value).is_integer() else 0.0


def scheduled_scale(scale: float, minimum: float, mode: str, frac: float, value: float) -> float:
    """A guidance scale at one place of the schedule.

    Args:
        minimum: where the ramp begins or ends; above `scale` it runs the other way.
        mode: one of MODES.
        frac: the place, 0 at the first step and 1 at the last.
        value: the exponent of the power modes, the repetitions of the repeating ones.
    """
    return minimum + (scale - minimum) * _SHAPES[mode](frac, value)


def dynamic_threshold(
    cond: Tensor,
    uncond: Tensor,
    *,
    cfg_scale: float,
    mimic_scale: float,
    threshold_percentile: float,
    mimic_mode: str,
    mimic_scale_min: float,
    cfg_mode: str,
    cfg_scale_min: float,
    sched_val: float,
    separate_feature_channels: bool,
    scaling_startpoint: str,
    variability_measure: str,
    interpolate_phi: float,
    frac: float,
) -> Tensor:
    """The guided prediction, in the dtype of `cond`; neither input is changed.

    Args:
        cond, uncond: predictions of the clean latents [B, C, ...] for both prompts.
        threshold_percentile: 0..1, the quantile of the CFG's differences that is its range (AD).
        separate_feature_channels: ranges of each channel, else one for a sample and all channels.
        interpolate_phi: 0..1, the share of the thresholded prediction beside the plain CFG.
        frac: place in the schedule, 0 at the first step and 1 at the last.
    """
    wide = torch.promote_types(cond.dtype, torch.float32)  # quantiles have no half precision
    positive, negative = (tensor.to(wide).flatten(2) for tensor in (cond, uncond))
    cfg = scheduled_scale(cfg_scale, cfg_scale_min, cfg_mode, frac, sched_val)
    mimic = scheduled_scale(mimic_scale, mimic_scale_min, mimic_mode, frac, sched_val)
    guided = negative + cfg * (positive - negative)
    mimicked = negative + mimic * (positive - negative)
    mean = guided.mean(2, keepdim=True)
    difference = guided - mean
    mimic_difference = mimicked - mimicked.mean(2, keepdim=True)
    axes = (2,) if separate_feature_channels else (1, 2)
    if variability_measure == "AD":
        mimic_range = mimic_difference.abs().amax(axes, keepdim=True)
        cfg_range = _quantile(difference.abs(), threshold_percentile, axes)
    else:
        mimic_range = mimic_difference.std(axes, keepdim=True)
        cfg_range = difference.std(axes, keepdim=True)
    level = guided.abs().amax(axes, keepdim=True)
    if scaling_startpoint == "ZERO":
        result = guided * _ratio(mimic_range, cfg_range, level)
    elif variability_measure == "STD":
        result = mean + difference * _ratio(mimic_range, cfg_range, level)
    else:
        limit = torch.maximum(mimic_range, cfg_range)
        result = mean + difference.clamp(-limit, limit) * _ratio(mimic_range, limit, level)
    mixed = interpolate_phi * result + (1.0 - interpolate_phi) * guided
    return mixed.reshape(cond.shape).to(cond.dtype)


def _ratio(part: Tensor, whole: Tensor, level: Tensor) -> Tensor:
    """part / whole, and 1 where `whole` is only rounding of values as large as `level`: a channel
    that is constant has nothing to be brought back."""
    smallest = 16 * torch.finfo(whole.dtype).eps * level
    return torch.where(whole > smallest, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), 1.0)


def _quantile(values: Tensor, share: float, axes: tuple[int, ...]) -> Tensor:
    """Linear between neighbours, as torch.quantile, which takes no more than 2^24 values."""
    flat = values.flatten(axes[0])
    place = share * (flat.shape[-1] - 1)
    below = math.floor(place)
    lower = flat.kthvalue(below + 1, dim=-1, keepdim=True).values
    if below == place:
        found = lower
    else:
        upper = flat.kthvalue(below + 2, dim=-1, keepdim=True).values
        found = torch.lerp(lower, upper, place - below)
    return found if len(axes) == 1 else found.unsqueeze(-1)
