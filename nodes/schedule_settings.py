"""The node that says which shares of noise are trained, and how errors count."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..trainers.flow_settings import (
    HUBER_SCHEDULES,
    LOSS_WEIGHTS,
    LOSSES,
    RAMPS,
    ROLLOUT_OFFSETS,
    TIMESTEP_SAMPLING,
    FlowSettings,
    LossSettings,
    RolloutSettings,
    TimestepSettings,
    parse_sigmas,
)
from ..trainers.timestep_picture import timestep_picture
from . import host
from .wires import AtelierFlowSettings

_ROLLOUT = {
    "rollout": "max_offset",
    "rollout_probability": "probability",
    "rollout_start": "start_probability",
    "rollout_ramp_steps": "ramp_steps",
    "rollout_ramp": "ramp",
    "rollout_offsets": "offsets",
}
"""Inputs of the node, and the fields of RolloutSettings that they are."""


class ScheduleSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierScheduleSettings",
            display_name="Schedule Settings",
            category="Atelier/training",
            description="Which shares of noise a training sees and how often, how errors are "
            "counted, which guidance the model is given. Run it to see the density and the weight "
            "as a picture. Not connected, a training sees all shares alike.",
            search_aliases=["timesteps", "noise schedule", "shift", "huber", "loss weighting"],
            is_output_node=True,
            inputs=[*_timesteps(), *_loss(), *_rollout(), *_size()],
            outputs=[
                AtelierFlowSettings.Output(
                    display_name="schedule",
                    tooltip="For the input schedule_settings of Train LoRA.",
                ),
                io.Image.Output(
                    display_name="picture",
                    tooltip="How often each share of noise is trained and how much its error "
                    "counts, for Save Image.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, **settings: Any) -> bool | str:
        if None in settings.values():  # a linked input is not known yet
            return True
        try:
            _flow_settings(settings)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, width: int, height: int, **settings: Any) -> io.NodeOutput:
        flow = _flow_settings(settings)
        picture = timestep_picture(flow, width=width, height=height)
        image = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]
        return io.NodeOutput(flow, image, ui=ui.PreviewImage(image))


def _flow_settings(settings: dict[str, Any]) -> FlowSettings:
    """Of the values of all inputs."""
    values = {**settings, "custom": parse_sigmas(settings["custom"])}
    return FlowSettings(
        timesteps=TimestepSettings(**_fields(TimestepSettings, values)),
        loss=LossSettings(**_fields(LossSettings, values)),
        rollout=RolloutSettings(**{field: values[name] for name, field in _ROLLOUT.items()}),
        noise_offset=values["noise_offset"],
        guidance_max=values["guidance_max"],
        bypass_guidance=values["bypass_guidance"],
    )


def _fields(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {field.name: values[field.name] for field in dataclasses.fields(kind)}


def _timesteps() -> list[Any]:
    default = TimestepSettings()
    return [
        io.Combo.Input(
            "sampling",
            options=list(TIMESTEP_SAMPLING),
            default=default.sampling,
            tooltip="How often each share of noise is trained. uniform, balanced: all alike. "
            "logit_normal, sigmoid, mode, beta: the middle more often. shift, flux_shift: sigmoid "
            "moved towards noise. content: much noise, which is composition; style: little noise, "
            "which is detail. fast: the four steps of schnell. custom: the list below. None costs "
            "time or memory. On the demo's style none was better than uniform, and content and "
            "style were 2 to 3 % worse (docs/methods.md).",
        ),
        io.Float.Input(
            "shift",
            default=default.shift,
            min=0.0,
            max=100.0,
            step=0.01,
            round=False,
            tooltip="Moves all draws: above 1 towards noise (composition, colour), below 1 towards "
            "detail; 3 is usual, 0 is off. What is moved to is learned at the expense of the rest.",
        ),
        io.Boolean.Input(
            "auto_shift",
            default=default.auto_shift,
            tooltip="The shift that FLUX.1-dev samples with: larger for larger pictures, 3.16 at "
            "1024x1024. In place of shift; fine detail is trained less.",
        ),
        _float(
            "logit_mean",
            default.logit_mean,
            -10.0,
            10.0,
            tooltip="logit_normal: above 0 more noise, below 0 less.",
        ),
        _float(
            "logit_std",
            default.logit_std,
            0.01,
            10.0,
            tooltip="logit_normal: smaller values stay nearer to the middle.",
        ),
        _float(
            "mode_scale",
            default.mode_scale,
            -1.0,
            1.75,
            tooltip="mode: above 0 the middle more often, below 0 the ends. 1.29 is SD3's.",
        ),
        _float(
            "sigmoid_scale",
            default.sigmoid_scale,
            0.01,
            10.0,
            tooltip="sigmoid, shift, flux_shift: a larger value goes more often to both ends.",
        ),
        _float(
            "beta_alpha",
            default.beta_alpha,
            0.01,
            100.0,
            tooltip="beta: its first parameter; larger than beta_beta leads to noise.",
        ),
        _float(
            "beta_beta",
            default.beta_beta,
            0.01,
            100.0,
            tooltip="beta: its second parameter; larger than beta_alpha leads to detail.",
        ),
        io.String.Input(
            "custom",
            default="",
            tooltip="For the sampling custom: shares of noise up to 1, or timesteps up to 1000, "
            "with commas, each trained as often as it is listed: 1, 1, 0.75, 0.5. What is not "
            "listed is not learned.",
        ),
    ]


def _loss() -> list[Any]:
    default = LossSettings()
    return [
        io.Combo.Input(
            "loss",
            options=list(LOSSES),
            default=default.loss,
            tooltip="mse: the square of each error. huber, smooth_l1: large errors count less, so "
            "that bad pictures do less harm, and rare details are learned more slowly. huber's "
            "gradients shrink with huber_c: it may need a larger learning rate.",
        ),
        _float(
            "huber_c",
            default.huber_c,
            0.001,
            1.0,
            tooltip="huber, smooth_l1: the error above which an error counts less than its square.",
            step=0.001,
        ),
        host.make_input(
            io.Combo,
            "huber_schedule",
            options=list(HUBER_SCHEDULES),
            default=default.huber_schedule,
            advanced=True,
            tooltip="How huber_c goes from picture to noise. exponential, snr: from 1 at the "
            "picture down to huber_c at noise.",
        ),
        io.Combo.Input(
            "weight",
            options=list(LOSS_WEIGHTS),
            default=default.weight,
            tooltip="How much an error counts at each share of noise. cosmap: the middle a little "
            "more. bell: the middle most, both ends hardly. sigma_sqrt: little noise up to a "
            "million times more, so that the loss jumps wildly; the demo's style was learned 4 % "
            "worse with it.",
        ),
        _float(
            "noise_offset",
            FlowSettings.noise_offset,
            0.0,
            1.0,
            tooltip="Adds a random constant to the "
            "noise of each channel, so that very dark and very bright pictures are learned; "
            "0.05 is usual, 0 is off. Too much spoils the contrast of all pictures.",
        ),
        _float(
            "guidance_max",
            FlowSettings.guidance_max,
            0.0,
            100.0,
            tooltip="Each sample is given a "
            "guidance drawn from the one of Train LoRA up to this one; 0 is off. Up to 4 the "
            "LoRA works at several guidances, and learns more slowly.",
            step=0.1,
        ),
        host.make_input(
            io.Boolean,
            "bypass_guidance",
            default=FlowSettings.bypass_guidance,
            advanced=True,
            tooltip="Train as if FLUX.1-dev had no guidance embedding; sampling still has it. For "
            "training away from the distillation: the first pictures are softer.",
        ),
    ]


def _rollout() -> list[Any]:
    default = RolloutSettings()
    return [
        io.Int.Input(
            "rollout",
            default=default.max_offset,
            min=0,
            max=100,
            tooltip="Scheduled sampling: some samples are trained where up to this many steps of "
            "the model itself led, so that it learns to correct its own errors. 0 is off, 5 to 10 "
            "are usual. Each step is one more forward pass: about a third of a batch's time, half "
            "of it without gradient_checkpointing. No memory.",
        ),
        _float(
            "rollout_probability",
            default.probability,
            0.0,
            1.0,
            tooltip="Share of the samples with a rollout. Costs time in proportion.",
        ),
        _float(
            "rollout_start",
            default.start_probability,
            0.0,
            1.0,
            tooltip="This share at the start, when rollout_ramp_steps is above 0.",
        ),
        host.make_input(
            io.Int,
            "rollout_ramp_steps",
            default=default.ramp_steps,
            min=0,
            max=1_000_000,
            advanced=True,
            tooltip="Steps in which the share goes from rollout_start to rollout_probability. 0: "
            "at once. With a ramp the model first learns without its own errors.",
        ),
        host.make_input(
            io.Combo,
            "rollout_ramp",
            options=list(RAMPS),
            default=default.ramp,
            advanced=True,
            tooltip="linear: evenly. cosine: slowly at both ends.",
        ),
        host.make_input(
            io.Combo,
            "rollout_offsets",
            options=list(ROLLOUT_OFFSETS),
            default=default.offsets,
            advanced=True,
            tooltip="How many steps of the model there are. uniform: all numbers up to rollout "
            "alike. early: fewer, faster. late: more, slower.",
        ),
    ]


def _size() -> list[Any]:
    return [
        io.Int.Input(
            name,
            default=1024,
            min=64,
            max=8192,
            step=16,
            tooltip=f"The {name} of the pictures that the drawn picture is about: the automatic "
            "shift goes by their size. Changes nothing in the training.",
        )
        for name in ("width", "height")
    ]


def _float(
    name: str, default: float, low: float, high: float, *, tooltip: str, step: float = 0.01
) -> Any:
    """One of the settings that few need."""
    return host.make_input(
        io.Float,
        name,
        default=default,
        min=low,
        max=high,
        step=step,
        round=False,
        advanced=True,
        tooltip=tooltip,
    )
