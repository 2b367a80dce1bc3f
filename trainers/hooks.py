"""Between a training and its surroundings: what they hear of it, and what they may ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .control import Control
from .data import TrainingData
from .rhythm import NEVER, Rhythm
from .status import Status


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known after an optimizer step."""

    step: int
    num_steps: int
    loss: float
    parts: dict[str, float] = field(default_factory=dict)
    """What the loss has beside that of the pictures to learn: see `preservation.Losses`."""
    grad_norm: float | None
    """None when float16 overflowed and the step was left out."""
    learning_rate: float
    seconds: float
    """That this step took."""
    seconds_per_step: float
    """Of this step and those before it, the recent ones counting more."""
    memory: int | None
    """Bytes of the device that torch has given out; None on a CPU."""
    ram: int
    """Bytes of this process in RAM."""

    @property
    def seconds_left(self) -> float:
        return (self.num_steps - self.step) * self.seconds_per_step

    def metrics(self) -> dict[str, float | int | None]:
        """Its line in the run's metrics, without the parts of the loss."""
        names = ("step", "loss", "grad_norm", "learning_rate", "seconds", "memory", "ram")
        return {name: getattr(self, name) for name in names}


def explain(error: BaseException) -> str | None:
    """The sentence for an error, or None for Ctrl-C."""
    if isinstance(error, KeyboardInterrupt):
        return None
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the surroundings want to hear of a run, what they ask of it, and how they stop it."""

    control: Control = field(default_factory=Control)
    """Through which other threads ask it to stop and keep, pause, go on, save or draw."""
    check_stop: Callable[[], None] = lambda: None
    """Called before every micro-step; it raises to stop. The run is saved and the error goes on."""
    explain: Callable[[BaseException], str | None] = explain
    """The sentence for an error that ended the run, or None if the user stopped it."""
    before_start: Callable[[], None] = lambda: None
    """Called once if there are steps to train, before anything is written; it raises to refuse."""
    on_start: Callable[[int, int], None] = lambda step, num_steps: None
    """Called once with the step the run starts from and its length; no other process trains it."""
    on_step: Callable[[Step], None] = lambda step: None
    on_measure: Callable[[int, dict[str, float]], None] = lambda step, values: None
    """Called with a step and what was measured of it besides: the `eval_loss`."""
    on_warning: Callable[[str], None] = lambda sentence: None
    """Called with a sentence about what goes wrong and does not end the run."""
    on_status: Callable[[Status], None] = lambda status: None
    """Called when the state of the run changed."""
    on_pause: Callable[[], None] = lambda: None
    """Called when the run is saved and holds nothing on the device any more."""
    take_device: Callable[[], None] = lambda: None
    """Called before the run takes the device, at its start and after each pause."""
    keep: Callable[[Trained], None] = lambda trained: None
    """Called when it was asked to save now, with what is trained."""
    sample: Callable[[int, dict[str, Tensor]], None] | None = None
    """Called with the step and the LoRA's tensors, to draw pictures with them before that step."""
    held_out: TrainingData | None = None
    """Samples that are not trained, on which the loss is measured."""
    validation: Rhythm = NEVER
    """When pictures are drawn and the loss of `held_out` is measured. The pictures of the end are
    drawn by who writes the LoRA file."""
    node: str | None = None
    """Id of the node that trains."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The outcome of a run."""

    lora: dict[str, Tensor]
    """Trained tensors by diffusers name, float32 on the CPU."""
    losses: list[float]
    """Training loss of every optimizer step."""
    step: int
