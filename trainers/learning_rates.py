"""How the learning rate goes over a run: a function of the step alone, so nothing is resumed."""

from __future__ import annotations

import math
from collections.abc import Callable

from .optimizer_settings import OptimizerSettings


def rate_factor(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """What the learning rate is multiplied by in the step after `step` others, 0 to 1.

    Warm-up is linear from 0, as in diffusers' get_scheduler, so the very first step learns nothing.
    The schedule covers the steps after it.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return step / warmup
    if not settings.needs_length:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    low = settings.min_factor
    return low + (1.0 - low) * _FALLS[settings.schedule](settings, progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


_FALLS: dict[str, Callable[[OptimizerSettings, float], float]] = {
    "linear": lambda _, progress: 1.0 - progress,
    "cosine": lambda _, progress: _cosine(progress),
    "cosine_with_restarts": lambda settings, progress: (
        _cosine(settings.cycles * progress % 1.0) if progress < 1.0 else 0.0
    ),
    "polynomial": lambda settings, progress: (1.0 - progress) ** settings.power,
    # Chen et al., "REX: Revisiting Budgeted Training with an Improved Schedule", 2021.
    "rex": lambda _, progress: (1.0 - progress) / (1.0 - progress / 2.0),
}
"""From 1 at a progress of 0 to 0 at 1."""
