"""What other threads ask of a training. It hears them between two of its steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal, get_args

Request = Literal["stop", "pause", "resume", "save", "sample"]
REQUESTS: tuple[Request, ...] = get_args(Request)
_OPPOSITE: dict[Request, Request] = {"pause": "resume", "resume": "pause"}
_LOOK_S = 0.2


class Control:
    """Requests to one training, from any thread. A request made twice is one, and of pause and
    resume the last one counts."""

    def __init__(self) -> None:
        self._asked: set[Request] = set()
        self._changed = threading.Condition()

    def request(self, what: Request) -> None:
        """Ask the training to stop and keep what it has, to pause, to go on, to save, or to draw
        sample pictures, before its next step."""
        with self._changed:
            self._asked -= {_OPPOSITE.get(what)}
            self._asked.add(what)
            self._changed.notify_all()

    def is_asked(self, what: Request) -> bool:
        """Whether `what` was asked for and not taken yet."""
        with self._changed:
            return what in self._asked

    def take(self, what: Request) -> bool:
        """Whether `what` was asked for, which is answered with this."""
        with self._changed:
            if what not in self._asked:
                return False
            self._asked.remove(what)
            return True

    def wait_while_paused(self, check_stop: Callable[[], None]) -> None:
        """Return when the training is asked to go on, or to stop.

        Args:
            check_stop: called a few times a second; it raises to end the waiting.
        """
        while not (self.is_asked("resume") or self.is_asked("stop")):
            check_stop()
            with self._changed:
                if not self._asked & {"resume", "stop"}:
                    self._changed.wait(_LOOK_S)
        self.take("resume")
