"""What a run says of itself on disk, in `status.json`: written when its state changes."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .files import write_json

State = Literal["training", "paused", "stopped", "finished", "cancelled", "failed"]
"""`stopped` is Stop and keep: the run is complete as it is. `cancelled` goes on when it is queued
again, as does `failed`. A process that was killed leaves `training` or `paused` behind."""
STATES: tuple[State, ...] = get_args(State)
STATUS_FILE = "status.json"


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a run, and what goes with it."""

    state: State
    step: int
    """Optimizer steps that were done when it was written."""
    num_steps: int
    """The length that was asked for."""
    started: float
    """Unix time of the start of this training of the run."""
    updated: float
    """Unix time at which it was written."""
    error: str | None = None
    """Why it failed."""
    lora: str | None = None
    """Name of the LoRA file, when there is one."""
    node: str | None = None
    """Id of the node that trains it, inside ComfyUI."""
    can_sample: bool = False
    """Whether it was told how to draw sample pictures."""
    went_on: bool = False
    """Whether it was stopped and kept once, and resumed: the same graph gives another LoRA then."""

    def __post_init__(self) -> None:
        numbers = (self.step, self.num_steps, self.started, self.updated)
        if not all(isinstance(number, (int, float)) for number in numbers):  # read from a file
            raise TypeError(f"there is no number where one belongs in {numbers}")

    def changed(self, **values: object) -> Status:
        return dataclasses.replace(self, updated=time.time(), **values)  # pyright: ignore[reportArgumentType]


def write_status(folder: Path, status: Status) -> None:
    """Raises ValueError if the disk is full or refuses."""
    write_json(folder / STATUS_FILE, dataclasses.asdict(status))


def read_status(folder: Path) -> Status | None:
    """The status of a run, or None if it has none: an older version left it.

    Raises:
        ValueError: if it is damaged, or from another version.
    """
    path = folder / STATUS_FILE
    try:
        status = Status(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"The file '{path}' cannot be read as the state of a run: {error}. Delete it: the run "
            "then goes on from its last checkpoint."
        ) from error
    if status.state not in STATES:
        raise ValueError(
            f"The run of '{path}' is in a state that this version does not know: {status.state!r}. "
            "Take the version of the pack that wrote it, or delete the file."
        )
    return status
