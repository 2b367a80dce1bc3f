"""When something that is repeated during a training is due."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .checks import require


@dataclass(frozen=True, kw_only=True)
class Rhythm:
    """Every so many steps or epochs, and perhaps at the start and at the end."""

    every: int
    """0 for only the start and the end."""
    unit: Literal["steps", "epochs"] = "steps"
    at_start: bool = True
    at_end: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 0, f"The distance must be 0 (never) or more, got {self.every}.")

    def is_due(self, step: int, steps_per_epoch: float) -> bool:
        """Whether a step between the start and the end is one of those, after `step` steps."""
        if step == 0:
            return self.at_start
        if not self.every:
            return False
        distance = self.every * (steps_per_epoch if self.unit == "epochs" else 1)
        return _whole(step / distance) > _whole((step - 1) / distance)


def _whole(number: float) -> int:
    """Rounded down, but for the errors of a division: 6 / (3 * 0.4) is a little less than 5."""
    return math.floor(number + 1e-9)


NEVER = Rhythm(every=0, at_start=False, at_end=False)
