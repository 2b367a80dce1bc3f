"""How long work says how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

OnProgress = Callable[[int, int], None]
"""Called with (done, total). It may raise to stop: what was done until then is kept."""


def throttled(on_progress: OnProgress | None) -> OnProgress:
    """Calls it ten times a second at most, and at the end."""
    due = 0.0

    def report(done: int, total: int) -> None:
        nonlocal due
        if on_progress and (done == total or time.monotonic() >= due):
            on_progress(done, total)
            due = time.monotonic() + 0.1

    return report
