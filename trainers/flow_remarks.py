"""Settings of the noise and the loss that do nothing where they are, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .config import TrainSettings
from .flow_settings import PARAMETERS, LossSettings, RolloutSettings, TimestepSettings
from .rollout import probability


def flow_remarks(settings: TrainSettings, *, takes_guidance: bool, num_steps: int) -> list[str]:
    """A sentence for every setting that was changed and has no effect, or less than it says.

    Args:
        takes_guidance: whether the base model has a guidance embedding.
        num_steps: the length of the training in optimizer steps.
    """
    flow = settings.flow
    return [
        *_of_timesteps(flow.timesteps),
        *_of_loss(flow.loss),
        *_of_guidance(settings, takes_guidance),
        *_of_rollout(flow.rollout, num_steps),
    ]


def _of_timesteps(settings: TimestepSettings) -> Iterator[str]:
    sampling = settings.sampling
    owners: dict[str, list[str]] = {"custom": ["custom"]}
    for name, parameters in PARAMETERS.items():
        for parameter in parameters:
            owners.setdefault(parameter, []).append(name)
    for name, samplings in owners.items():
        if sampling not in samplings and _is_changed(settings, name):
            yield (
                f"The setting {name} has no effect with the timestep sampling '{sampling}'. It "
                f"belongs to {', '.join(samplings)}."
            )
    if settings.auto_shift and sampling == "flux_shift":
        yield "The setting auto_shift has no effect: flux_shift has this shift already."
    if sampling in ("fast", "custom") and (settings.shift not in (0, 1) or settings.auto_shift):
        yield (
            f"The shift moves the steps of the timestep sampling '{sampling}' too, which then are "
            "other sigmas than its own. Turn shift and auto_shift off."
        )


def _of_loss(settings: LossSettings) -> Iterator[str]:
    for name in ("huber_c", "huber_schedule"):
        if settings.loss == "mse" and _is_changed(settings, name):
            yield f"The setting {name} has no effect with the loss mse."


def _of_guidance(settings: TrainSettings, takes_guidance: bool) -> Iterator[str]:
    values = {
        "guidance": settings.guidance != TrainSettings.guidance,
        "guidance_max": bool(settings.flow.guidance_max),
        "bypass_guidance": settings.flow.bypass_guidance,
    }
    for name, is_changed in values.items():
        if is_changed and not takes_guidance:
            yield f"The setting {name} has no effect: this model takes no guidance."
    if settings.flow.bypass_guidance and takes_guidance and values["guidance"]:
        yield "The setting guidance has no effect: bypass_guidance leaves it out."


def _of_rollout(settings: RolloutSettings, num_steps: int) -> Iterator[str]:
    names = {
        "offsets": "rollout_offsets",
        "probability": "rollout_probability",
        "start_probability": "rollout_start",
        "ramp_steps": "rollout_ramp_steps",
        "ramp": "rollout_ramp",
    }
    if not settings.max_offset:
        for field, name in names.items():
            if _is_changed(settings, field):
                yield f"The setting {name} has no effect: rollout is 0."
        return
    if not settings.ramp_steps:
        for field in ("start_probability", "ramp"):
            if _is_changed(settings, field):
                yield f"The setting {names[field]} has no effect: rollout_ramp_steps is 0."
    if settings.ramp_steps > num_steps:
        yield (
            f"The rollout's ramp of {settings.ramp_steps} steps is longer than this training of "
            f"{num_steps}: at its end {probability(settings, num_steps):.0%} of the samples have a "
            f"rollout, not {settings.probability:.0%}."
        )
    if max(settings.probability, settings.start_probability) == 0:
        yield "The setting rollout has no effect: its probability is 0."


def _is_changed(settings: Any, name: str) -> bool:
    return getattr(settings, name) != getattr(type(settings)(), name)
