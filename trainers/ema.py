"""Averages of the weights: an exponential one, and which weights are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .optimizer_settings import SCHEDULE_FREE, OptimizerSettings


class Ema:
    """The exponential moving average of float32 parameters, which starts at what they are."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.average = [parameter.detach().clone() for parameter in parameters]

    def update(self, step: int) -> None:
        """Take in the weights after the step that had `step` others before it.

        The decay is that of diffusers' EMAModel, so that the start does not count for long: 0 at
        first, then min(decay, (1 + step) / (10 + step)).
        """
        decay = min(self._decay, (1 + step) / (10 + step)) if step else 0.0
        with torch.no_grad():
            for average, parameter in zip(self.average, self._parameters, strict=True):
                average.lerp_(parameter, 1.0 - decay)


class ShownWeights:
    """Which weights of a training are measured, drawn and saved as the LoRA: those that are
    trained, an average of them, or those of a schedule-free optimizer.

    Make it when the parameters have what is shown, before they get what is trained.
    """

    def __init__(
        self,
        settings: OptimizerSettings,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._schedule_free = settings.optimizer in SCHEDULE_FREE
        self._ema = Ema(parameters, settings.ema_decay) if settings.ema_decay else None

    @property
    def are_trained(self) -> bool:
        """Whether they are just those that are trained."""
        return not self._schedule_free and self._ema is None

    def update(self, step: int) -> None:
        """After the optimizer step that had `step` others before it."""
        if self._ema is not None:
            self._ema.update(step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the parameters have the shown weights, after it again the trained ones, to the
        bit: a schedule-free optimizer's own way back would round."""
        if self.are_trained:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self._parameters]
        try:
            if self._ema is not None:
                self._set(self._ema.average)
            else:
                self._optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]
            yield
        finally:
            if self._schedule_free:
                self._optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
            self._set(trained)

    def _set(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)
