"""Checks of what users gave."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` for a user's mistake."""
    if not condition:
        raise ValueError(message)
