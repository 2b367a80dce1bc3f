"""Guidance that FLUX lacks: a negative prompt without burnt pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from . import host
from .dynamic_threshold import (
    MEASURES,
    MODES,
    STARTPOINTS,
    dynamic_threshold,
    scheduled_scale,
)

BASES = ("upstream", "steps", "sigma")
_MODE = "Half Cosine Up"
_CHANNELS = ("enable", "disable")


@dataclass(kw_only=True, eq=False)
class DynamicThreshold:
    """What ComfyUI calls at each step in place of its own guidance."""

    settings: dict[str, Any]
    """Those of `dynamic_threshold` but for `cfg_scale`, which is the sampler's, and `frac`."""
    basis: str
    start_percent: float
    end_percent: float
    show: Callable[[str], None]
    told: Tensor | None = field(default=None, init=False)
    """The sigmas of the run whose readout was shown."""

    def __call__(self, args: dict[str, Any]) -> Tensor:
        """The noise to take away, as ComfyUI wants it: the input less the guided prediction."""
        positive, negative = args["cond_denoised"], args["uncond_denoised"]
        sigmas = args["model_options"].get("transformer_options", {}).get("sample_sigmas")
        sigma, cfg = float(args["sigma"].max()), float(args["cond_scale"])
        # Without a negative, as with a CFG of 1, ComfyUI gives zeros for it.
        has_negative = args.get("input_uncond") is not None and bool(torch.any(negative != 0))
        if not has_negative:
            return args["cond"]
        if sigmas is not None and sigmas is not self.told:  # guiders may skip the first steps
            self.told = sigmas
            self.show(self.readout(cfg, [self._place(args, float(s), sigmas) for s in sigmas[:-1]]))
        if not self.start_percent <= self._by_steps(args, sigma, sigmas) <= self.end_percent:
            return args["cond"]
        if self._is_plain(cfg):
            return args["input"] - torch.lerp(negative, positive, cfg)
        frac = self._place(args, sigma, sigmas)
        guided = dynamic_threshold(positive, negative, cfg_scale=cfg, frac=frac, **self.settings)
        # A guider may leave the negative of single samples out by giving them the positive twice.
        has_none = (positive == negative).flatten(1).all(1).view(-1, *[1] * (positive.ndim - 1))
        return args["input"] - torch.where(has_none, positive, guided)

    def _is_plain(self, cfg: float) -> bool:
        """Whether the known extension skips its schedules and thresholds."""
        return self.basis == BASES[0] and cfg == self.settings["mimic_scale"]

    def readout(self, cfg: float, places: list[float]) -> str:
        """The scales that really act, from the first step to the last, and what is odd in them."""
        if self._is_plain(cfg):
            return (
                f"Plain CFG of {cfg:.2f}: with equal scales the basis upstream changes nothing. "
                "Set mimic_scale below the sampler's cfg."
            )
        values = self.settings
        cfgs, mimics = (
            [
                scheduled_scale(
                    scale,
                    values[f"{kind}_scale_min"],
                    values[f"{kind}_mode"],
                    place,
                    values["sched_val"],
                )
                for place in places
            ]
            for kind, scale in (("cfg", cfg), ("mimic", values["mimic_scale"]))
        )
        lines = [
            f"CFG acts from {cfgs[0]:.2f} to {cfgs[-1]:.2f}, mimic from {mimics[0]:.2f} to "
            f"{mimics[-1]:.2f}."
        ]
        if min(cfgs) < 1:
            lines.append(
                f"The CFG that acts falls to {min(cfgs):.2f}: below 1 it leads towards the "
                "negative prompt. Raise the sampler's cfg, or cfg_scale_min."
            )
        is_range = (values["scaling_startpoint"], values["variability_measure"]) == ("MEAN", "AD")
        if is_range and all(m >= c for c, m in zip(cfgs, mimics, strict=True)):
            lines.append(
                "Nothing is brought back: mimic is not below the CFG at any step. Lower "
                "mimic_scale, or raise the sampler's cfg."
            )
        return "\n".join(lines)

    def _place(self, args: dict[str, Any], sigma: float, sigmas: Tensor | None) -> float:
        """The place in the schedule at a sigma."""
        if self.basis == "upstream":
            # On FLUX the timestep is sigma itself, so the place is 1.000 to 1.001 all the way.
            timestep = args["model"].model_sampling.timestep(torch.tensor(sigma))
            return (999 - float(timestep)) / 998
        if self.basis == "steps":
            return self._by_steps(args, sigma, sigmas)
        return _noise_gone(args, sigma)

    def _by_steps(self, args: dict[str, Any], sigma: float, sigmas: Tensor | None) -> float:
        """The place among the steps, or what stands for it without the run's sigmas, which guiders
        of other packs may not give."""
        if sigmas is None or len(sigmas) < 3:
            return _noise_gone(args, sigma)
        return _by_steps(sigma, sigmas)


def _noise_gone(args: dict[str, Any], sigma: float) -> float:
    """The share 0..1 of the noise that is gone."""
    largest = float(args["model"].model_sampling.sigma_max)
    return min(max(1 - sigma / largest, 0.0), 1.0)


def _by_steps(sigma: float, sigmas: Tensor) -> float:
    """The place 0..1 among the steps of a run, also between two, where second-order samplers
    ask."""
    steps = [float(one) for one in sigmas[:-1]]
    for index, (above, below) in enumerate(pairwise(steps)):
        if sigma >= below:
            part = (above - sigma) / (above - below) if above > below else 0.0
            return (index + min(max(part, 0.0), 1.0)) / (len(steps) - 1)
    return 1.0


class DynamicThresholdCfg(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierDynamicThresholdCFG",
            display_name="Dynamic Threshold CFG",
            category="Atelier/guidance",
            description="Lets the sampler's cfg be above 1 without burnt colours: a strong "
            "guidance is brought back to the range of a weaker one. For negative prompts on FLUX, "
            "and for LoRAs trained with real CFG. Each step computes twice then.",
            search_aliases=["dynamic thresholding", "mimic cfg", "true cfg", "negative prompt"],
            inputs=_inputs(),
            outputs=[
                io.Model.Output(tooltip="The MODEL, for a sampler whose cfg is above 1: try 5.")
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: Any, basis: str, start_percent: float, end_percent: float, **settings: Any
    ) -> io.NodeOutput:
        if start_percent > end_percent:
            raise ValueError(
                f"Dynamic Threshold CFG begins at {start_percent} and ends at {end_percent}, so it "
                "never acts. Set start_percent below end_percent."
            )
        if "sampler_cfg_function" in model.model_options:
            raise ValueError(
                "Another node has replaced the guidance of this MODEL already, and only one can "
                "act. Take it away, or Dynamic Threshold CFG."
            )
        settings["separate_feature_channels"] = (
            settings["separate_feature_channels"] == _CHANNELS[0]
        )
        if basis != BASES[0]:
            # A ramp that moves and begins below 1 makes the first step the negative prompt.
            least = {
                name: max(settings[name], 1.0) for name in ("cfg_scale_min", "mimic_scale_min")
            }
            settings |= least
        node_id = cls.hidden.unique_id
        guidance = DynamicThreshold(
            settings=settings,
            basis=basis,
            start_percent=start_percent,
            end_percent=end_percent,
            show=lambda text: host.show_text(text, node_id),
        )
        patched = model.clone()
        patched.set_model_sampler_cfg_function(guidance)
        return io.NodeOutput(patched)


def _inputs() -> list[Any]:
    """In the order and with the names of sd-dynamic-thresholding, then what it lacks."""
    return [
        io.Model.Input("model", tooltip="Any MODEL."),
        _scale(
            "mimic_scale",
            2.5,
            tooltip="The guidance whose range the pictures get. About half of the sampler's cfg.",
        ),
        io.Float.Input(
            "threshold_percentile",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="1 shrinks all until the largest difference fits. Lower values cut the largest "
            "ones off instead, which leaves a stronger picture.",
        ),
        _mode("mimic_mode", tooltip="How the mimic scale moves from the first step to the last."),
        _scale("mimic_scale_min", 0.0, tooltip="Where the ramp of the mimic scale begins or ends."),
        _mode("cfg_mode", tooltip="How the sampler's cfg moves from the first step to the last."),
        _scale("cfg_scale_min", 0.0, tooltip="Where the ramp of the cfg begins or ends."),
        io.Float.Input(
            "sched_val",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.01,
            tooltip="The exponent of the Power modes, and how often the Repeating and Sawtooth "
            "modes repeat. Without effect on the others.",
        ),
        io.Combo.Input(
            "separate_feature_channels",
            options=list(_CHANNELS),
            default=_CHANNELS[0],
            tooltip="enable: each latent channel has a range of its own. disable: one for all.",
        ),
        io.Combo.Input(
            "scaling_startpoint",
            options=list(STARTPOINTS),
            default=STARTPOINTS[0],
            tooltip="Around what values are brought back: the mean of their channel, or zero.",
        ),
        io.Combo.Input(
            "variability_measure",
            options=list(MEASURES),
            default=MEASURES[0],
            tooltip="What a range is. AD: the largest difference. STD: the standard deviation.",
        ),
        io.Float.Input(
            "interpolate_phi",
            default=0.7,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much of the result is brought back; the rest is plain guidance.",
        ),
        io.Combo.Input(
            "basis",
            options=list(BASES),
            default=BASES[0],
            tooltip="What moves the modes. upstream: as the known extension does, which on FLUX "
            "stands still at the end: Half Cosine Up is a constant factor of 0.46. steps or sigma: "
            "they really move, from 1 or the minimum, whichever is larger.",
        ),
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of the steps before which only the prompt acts.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Part of the steps after which only the prompt acts.",
        ),
    ]


def _scale(name: str, default: float, *, tooltip: str) -> Any:
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, tooltip=tooltip)


def _mode(name: str, *, tooltip: str) -> Any:
    return io.Combo.Input(name, options=list(MODES), default=_MODE, tooltip=tooltip)
