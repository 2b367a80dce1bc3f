"""Which optimizer trains, and how its step size goes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Of bitsandbytes' AdamW8bit with a constant step size, as the recipe has it."""
