"""The trainings of this process: how routes find them, and what the pages hear of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..trainers.control import Control
from ..trainers.hooks import Step
from ..trainers.status import State, Status
from . import host
from .validation import Picture

_INTERVAL_S = 0.1
"""At most ten events a second."""
_controls: dict[str, Control] = {}


def find(run_id: str) -> Control | None:
    """How to reach a training that runs, or is paused, in this process."""
    return _controls.get(run_id)


@contextmanager
def findable(run_id: str, control: Control) -> Iterator[None]:
    """While the inside runs, `find` gives `control`."""
    _controls[run_id] = control
    try:
        yield
    finally:
        del _controls[run_id]


class Reporter:
    """Tells every open page of one run: of its steps in parcels, of changes at once."""

    def __init__(self, run_id: str, node_id: str | None) -> None:
        self._who = {"run": run_id, "node": node_id}
        self.state: State = "finished"  # as of most runs that are answered from disk
        self._lines: list[dict[str, Any]] = []
        self._sent = 0.0

    def step(self, step: Step) -> None:
        """Tell of a step, together with others if they are many in a second."""
        self._lines.append(step.metrics())
        now = time.monotonic()
        if now - self._sent < _INTERVAL_S and step.step < step.num_steps:
            return
        columns = {name: [line[name] for line in self._lines] for name in self._lines[0]}
        host.send_event(
            "atelier.step",
            {
                **self._who,
                "state": "training",
                "step": step.step,
                "num_steps": step.num_steps,
                "seconds_left": step.seconds_left,
                "metrics": columns,
            },
        )
        self._lines, self._sent = [], now

    def status(self, status: Status) -> None:
        """Tell that the run is in another state."""
        self.state = status.state
        self.changed()

    def changed(self) -> None:
        """Tell that there is something new on disk."""
        host.send_event("atelier.run", {**self._who, "state": self.state})

    def preview(self, step: int, picture: Picture, url: str) -> None:
        """Show a sample picture while it is denoised, at most ten times a second."""
        now = time.monotonic()
        if now - self._sent < _INTERVAL_S:
            return
        self._sent = now
        data = {"step": step, "key": picture.key, "name": picture.prompt.name, "picture": url}
        host.send_event("atelier.preview", {**self._who, **data})
