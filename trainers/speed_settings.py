"""What makes a step cheaper, in time or in memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """How the network is computed, and how much of it."""
