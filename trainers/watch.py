"""What tells that a training goes wrong: numbers that are none, a LoRA that does not change, no
progress on held out pictures. Each is a sentence with the likely cause and what to change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .caches import LatentSubset
from .config import TrainSettings
from .devices import dtype_name

WATCHED_STEPS = 20
"""In so many steps the LoRA must have changed."""
PATIENCE = 5
"""Evaluations without a smaller loss after which it is told."""


class Diverged(ValueError):
    """A loss or a gradient is no number."""


def diverged(step: int, settings: TrainSettings, dtype: torch.dtype) -> Diverged:
    """What to raise in the step after `step` steps, computed in `dtype`."""
    is_narrow = dtype == torch.float16
    if step == 0 and not is_narrow:
        return Diverged(
            "The loss or a gradient is not a number in the first step, before anything is learned: "
            "the model's file or what was cached is damaged. Load another file, or clear the "
            "caches."
        )
    if step == 0:
        return Diverged(
            "The loss or a gradient is not a number in the first step, before anything is learned: "
            f"the model's numbers do not fit the compute dtype ({dtype_name(dtype)}), or its "
            "file is damaged. Set the compute dtype to bf16 or fp32, or load another file."
        )
    if not is_narrow:
        return Diverged(
            f"The loss or a gradient is not a number after {step} steps: the training diverged. "
            f"Lower the learning rate ({settings.learning_rate}). The last checkpoint with good "
            "numbers is kept."
        )
    return Diverged(
        f"The loss or a gradient is not a number after {step} steps: the training diverged. Lower "
        f"the learning rate ({settings.learning_rate}), or set the compute dtype to bf16 or fp32. "
        "The last checkpoint with good numbers is kept."
    )


class Watch:
    """Sees whether the first steps of a training change the LoRA.

    A LoRA that does nothing yet has no gradient from regularization pictures and class captions, so
    steps of these alone are not looked at.

    Args:
        start: the steps before those to look at.
        is_all_regularization: whether there are no other pictures.
    """

    def __init__(self, start: int, settings: TrainSettings, *, is_all_regularization: bool) -> None:
        self._start, self._settings = start, settings
        without_gradient = () if is_all_regularization else ("regularization", "class")
        self._ignored = frozenset(without_gradient)
        self._grad_norms: list[float | None] = []
        self._before: list[Tensor] = []

    def see(
        self,
        step: int,
        grad_norm: float | None,
        parameters: Sequence[Tensor],
        kinds: frozenset[str],
    ) -> None:
        """Look at what is trained after `step` steps.

        Args:
            grad_norm: None if float16 overflowed.
            kinds: of the pictures of the last step (`Part.kind`).

        Raises:
            ValueError: if WATCHED_STEPS steps changed nothing.
        """
        if step <= self._start or len(self._grad_norms) == WATCHED_STEPS:
            return
        if kinds <= self._ignored:
            return
        if not self._grad_norms:
            self._before = [parameter.detach().cpu().clone() for parameter in parameters]
        self._grad_norms.append(grad_norm)
        if len(self._grad_norms) == WATCHED_STEPS:
            before, self._before = self._before, []
            is_same = all(map(torch.equal, before, (p.detach().cpu() for p in parameters)))
            sentence = _nothing_learned(self._grad_norms, is_same, self._settings)
            if sentence:
                raise ValueError(sentence)


def _nothing_learned(
    grad_norms: Sequence[float | None], is_same: bool, settings: TrainSettings
) -> str | None:
    """The sentence for watched steps that taught nothing."""
    if all(norm == 0 for norm in grad_norms):
        return (
            f"All gradients of {WATCHED_STEPS} steps were zero, so that nothing was learned: the "
            "masks are black, all pictures are for regularization, or the loss weight is 0 "
            "everywhere. Look at the pictures with Inspect Dataset, and at the loss settings."
        )
    if is_same:
        return (
            f"The LoRA did not change in {WATCHED_STEPS} steps: its learning rate "
            f"({settings.learning_rate}) or what its schedule makes of it is too small. Raise the "
            "learning rate, or shorten the warm-up."
        )
    return None


def never_trained(subsets: Iterable[LatentSubset], num_steps: int) -> Iterator[str]:
    """A sentence for every dataset that begins after the end of a run of so many steps."""
    for subset in subsets:
        if subset.schedule.start_step >= num_steps:
            yield (
                f"The dataset '{subset.name}' is not trained: it begins after step "
                f"{subset.schedule.start_step}, and the run ends at {num_steps}. Lower start_step "
                "of Schedule Dataset, or train longer."
            )


def no_progress(losses: Mapping[int, float]) -> str | None:
    """A sentence if the last PATIENCE losses on held out pictures, by step in order, are the first
    so many that are not below the smallest one before them."""
    best = min(losses, key=losses.__getitem__, default=0)
    later = [step for step in losses if step > best]
    if len(later) != PATIENCE:
        return None
    if best == 0:
        return (
            f"The loss on held out pictures was not once below that of the start in {PATIENCE} "
            "evaluations: what is learned does not help there. Change the learning rate, or hold "
            "out pictures that are like those that are trained."
        )
    return (
        f"The loss on held out pictures has not fallen for {PATIENCE} evaluations since step "
        f"{best}: the LoRA begins to learn the training pictures by heart. The checkpoint of "
        f"step {best} is kept; more pictures, a lower learning rate or a lower rank go further."
    )
