"""Real CFG only while it matters: the negative prompt is left out where it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from . import host

_SAME_SIGMA = 1e-4
"""Relative: schedulers take sigmas from tables, so a step lies this near to its percentage."""


@dataclass(frozen=True, kw_only=True)
class NegativeRule:
    """When the negative prompt is computed."""

    threshold: float
    """Cosine similarity of the two predictions of x0 from which on it is left out; 1: never."""
    start_percent: float
    """Part of the sampling before which it is left out, 0..1, as of ComfyUI's own nodes."""
    end_percent: float


class NegativeRun:
    """What one run of a sampler has seen. Everything is decided by sigma, not by counting calls:
    samplers of second order ask several times in a step, some of them at the sigma of the next."""

    def __init__(self, rule: NegativeRule, sampling: Any, batch_size: int) -> None:
        self._rule = rule
        self._first, self._last = (
            float(sampling.percent_to_sigma(percent))
            for percent in (rule.start_percent, rule.end_percent)
        )
        self._alike_at = torch.zeros(batch_size)
        self._most_alike = torch.full((batch_size,), -1.0)
        self.calls = self.passes = 0

    def wants(self, sigma: float) -> bool:
        """Whether a sample of the batch needs the negative prompt at a sigma."""
        begun = sigma <= self._first * (1 + _SAME_SIGMA)
        goes_on = sigma >= self._last * (1 - _SAME_SIGMA)
        return begun and goes_on and bool((sigma >= self._alike_at).any())

    def see(self, args: dict[str, Any]) -> list[Tensor]:
        """ComfyUI's hook between the two predictions and the guidance: gives the negative of each
        sample, or where it does not act the positive, from which any guidance is the positive."""
        positive, negative = args["conds_out"][:2]
        self.calls += 1
        if args["conds"][1] is None:
            return args["conds_out"]
        self.passes += 1
        sigma = float(args["sigma"].max())
        # Zeros: none of its parts reaches to this place of the schedule.
        if not self.wants(sigma) or not torch.any(negative):
            return [positive, positive]
        active = sigma >= self._alike_at
        alike = _similarity(positive, negative)
        self._most_alike = torch.where(active, self._most_alike.maximum(alike), self._most_alike)
        if self._rule.threshold < 1:
            reached = (self._alike_at == 0) & (alike >= self._rule.threshold)
            self._alike_at[reached] = sigma
        shape = (-1, *[1] * (positive.ndim - 1))
        return [positive, torch.where(active.to(positive.device).view(shape), negative, positive)]

    def readout(self) -> str:
        """What it cost, and why it ended."""
        lines = [f"The negative prompt was computed {self.passes} of {self.calls} times."]
        last, most = float(self._alike_at.min()), float(self._most_alike.min())
        if last > 0:
            lines.append(f"Below sigma {last:.3f} it changed almost nothing and was left out.")
        elif most > -1:
            lines.append(f"The similarity of the two predictions came to {most:.4f}.")
        return "\n".join(lines)


def _similarity(positive: Tensor, negative: Tensor) -> Tensor:
    """Cosine of the angle of two predictions [B, ...], for each sample of the batch: [B]."""
    flat = (one.flatten(1).float() for one in (positive, negative))
    return torch.nn.functional.cosine_similarity(*flat, dim=1).cpu()


class Guider(comfy.samplers.CFGGuider):
    """ComfyUI's guider, that computes the negative prompt only while its rule says so."""

    def __init__(self, model: Any, rule: NegativeRule, show: Callable[[str], None]) -> None:
        super().__init__(model)
        self._rule, self._show = rule, show
        self._run: NegativeRun | None = None

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self._run = None  # ComfyUI keeps this object and samples with it again
        latents = super().sample(*args, **kwargs)
        if self._run is not None:
            self._show(self._run.readout())
        return latents

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] = {},  # noqa: B006, as the base has it
        seed: int | None = None,
    ) -> Tensor:
        if self._run is None:
            self._run = NegativeRun(self._rule, self.inner_model.model_sampling, len(x))
        hooks = [*model_options.get("sampler_pre_cfg_function", []), self._run.see]
        # With a cfg of 1 ComfyUI leaves the negative out, and calls all hooks as ever.
        cfg = self.cfg if self._run.wants(float(timestep.max())) else 1.0
        return comfy.samplers.sampling_function(
            self.inner_model,
            x,
            timestep,
            self.conds["negative"],
            self.conds["positive"],
            cfg,
            model_options={**model_options, "sampler_pre_cfg_function": hooks},
            seed=seed,
        )


class AdaptiveGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierAdaptiveGuider",
            display_name="Adaptive Guider",
            category="Atelier/guidance",
            description="Real CFG with a negative prompt, for SamplerCustomAdvanced, that is "
            "computed only while it matters: not in the first steps, and no more when both prompts "
            "predict the same picture. For LoRAs trained with real CFG, and cheaper than a "
            "KSampler with a cfg above 1.",
            search_aliases=["adaptive guidance", "cfg guider", "true cfg", "negative prompt"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any MODEL, also one with Dynamic Threshold CFG on it."
                ),
                io.Conditioning.Input("positive", tooltip="What the picture shall show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What it shall not show. Give both the same FluxGuidance.",
                ),
                io.Float.Input(
                    "cfg",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Strength of the real guidance. 1 is off. Above 2 FLUX burns, unless "
                    "the first steps are skipped, or Dynamic Threshold CFG is on the MODEL.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.996,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="When the predictions of both prompts are this similar, the negative "
                    "is left out from the next step on. 1 never does; 0.99 does so early.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the sampling at whose start the positive prompt acts alone: "
                    "0.15 is the first 3 of 20 steps. It protects the composition.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the sampling after which the positive prompt acts alone, "
                    "however different the predictions are.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For the input guider of SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        cfg: float,
        threshold: float,
        start_percent: float,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        if start_percent >= end_percent:
            raise ValueError(
                f"Adaptive Guider begins at {start_percent} and ends at {end_percent}, so its "
                "negative prompt never acts. Set start_percent below end_percent."
            )
        node_id = cls.hidden.unique_id
        rule = NegativeRule(
            threshold=threshold, start_percent=start_percent, end_percent=end_percent
        )
        guider = Guider(model, rule, lambda text: host.show_text(text, node_id))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)
