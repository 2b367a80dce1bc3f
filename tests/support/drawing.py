"""Latents drawn by ComfyUI's sampler, with euler, simple and a CFG of 1."""

from __future__ import annotations

from typing import Any

from atelier.nodes.sampling import draw_latents
from atelier.nodes.validation import Sampler
from torch import Tensor


def draw(model: Any, positive: list, *, steps: int, seed: int = 0, side: int = 64) -> Tensor:
    """Latents [1, 16, side/8, side/8] of a picture of `side` pixels."""
    return draw_latents(
        model,
        positive,
        positive,
        width=side,
        height=side,
        sampler=Sampler(steps=steps, seed=seed),
        show=lambda picture: None,
    )
