"""Patches that act in a part of the sampling, as hooks of ComfyUI's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import comfy.hooks
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..trainers.checks import require

_TOLERANCE = 1e-4
"""A step at the border of a range belongs to what begins there, also where the float32 of the
schedule is not the float64 of the percent."""


@dataclass(frozen=True, kw_only=True)
class SamplingRange:
    """The part of the sampling in which a LoRA acts, as ComfyUI counts it for prompts."""

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        require(
            0 <= self.start_percent < self.end_percent <= 1,
            f"A LoRA acts from start_percent to end_percent, got {self.start_percent} to "
            f"{self.end_percent}. Set start_percent below end_percent, both in 0 to 1.",
        )

    def holds(self, sigma: float, model_sampling: Any) -> bool:
        """Whether a step at `sigma` is in it: after the sigma of the start (which is in it) and
        before that of the end (which is not), so that two ranges that meet share no step.

        From 0 or to 1 it has no border there: samplers with noise of their own go beyond the
        first sigma."""
        if self.start_percent > 0 and sigma > _border(self.start_percent, model_sampling):
            return False
        return self.end_percent == 1 or sigma > _border(self.end_percent, model_sampling)


def _border(percent: float, model_sampling: Any) -> float:
    return float(model_sampling.percent_to_sigma(percent)) * (1 + _TOLERANCE)


WHOLE = SamplingRange()


def ranged(model: Any, span: SamplingRange) -> tuple[Any, Callable[[dict, float], object]]:
    """A clone of a MODEL, and what adds patches to it that act in a part of the sampling.

    They are patches of a hook, which ComfyUI puts on and takes off; prompts name the hooks that act
    while they are computed, so each call to the network gets it named while the range lasts.
    """
    if is_paged(model):
        model = _with_weights_that_stay(model)
    patched, hook = model.clone(), comfy.hooks.WeightHook()
    patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "atelier", _InRange(hook, span))
    return patched, partial(patched.add_hook_patches, hook)


def is_paged(model: Any) -> bool:
    """Whether ComfyUI pages the weights of a MODEL in and out."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def _with_weights_that_stay(model: Any) -> Any:
    """What newer hosts take themselves where a prompt has hooks: weights that they page in and out
    (dynamic VRAM) can have none, so the model's file is read once more."""
    if model.cached_patcher_init is None:
        raise ValueError(
            "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), so a LoRA cannot "
            "act in a part of the sampling. Set start_percent to 0 and end_percent to 1, or load "
            "the model by Load Quantized FLUX."
        )
    return model.get_non_dynamic_delegate()


class _InRange:
    """What ComfyUI calls around each computation of the prompts of a step."""

    def __init__(self, hook: comfy.hooks.WeightHook, span: SamplingRange) -> None:
        self._hook, self._span = hook, span
        self._alone = self._beside(comfy.hooks.HookGroup())
        # ComfyUI tells groups by what object they are: the same one at each step, or it would take
        # patches off and on again.
        self._groups: WeakKeyDictionary[Any, comfy.hooks.HookGroup] = WeakKeyDictionary()

    def __call__(
        self, executor: Any, model: Any, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> Any:
        if self._span.holds(float(timestep.max()), model.model_sampling):
            conds = [some and [self._hooked(one) for one in some] for some in conds]
        return executor(model, conds, x, timestep, options)

    def _hooked(self, cond: dict) -> dict:
        group = cond.get("hooks")
        if group is None:
            return {**cond, "hooks": self._alone}
        if group not in self._groups:
            self._groups[group] = self._beside(group)
        return {**cond, "hooks": self._groups[group]}

    def _beside(self, group: comfy.hooks.HookGroup) -> comfy.hooks.HookGroup:
        both = group.clone()
        both.add(self._hook)
        return both
