"""What the model shall keep of what it knows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreservationSettings:
    """Beside datasets of regularization pictures, which say so themselves."""
