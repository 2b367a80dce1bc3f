"""Inputs that several nodes have: one name, one range, one explanation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io

from ..trainers.buckets import MODES, STEP, Mode, Resolution
from ..trainers.captions import MISSING_CAPTIONS
from ..trainers.config import COMPUTE_DTYPES, JobSettings, TrainSettings
from ..trainers.dataset import DEFAULT_PICTURES, Dataset, PictureSettings, Subset
from ..trainers.lora_settings import LORA_TARGETS, LoraSettings
from ..trainers.scan import ON_BAD_FILE
from . import host
from .sampling import SAMPLERS, SCHEDULERS
from .validation import Sampler
from .wires import (
    AtelierCaptionSettings,
    AtelierFlowSettings,
    AtelierLoraSettings,
    AtelierOptimizerSettings,
    AtelierPictureSettings,
    AtelierPreservationSettings,
    AtelierSpeedSettings,
)

SIZE_AND_TRIGGER = ("width", "height", "mode", "repeats", "trigger")
"""What every node that makes a dataset asks, in this order."""


@dataclass(frozen=True, kw_only=True)
class PictureChoices:
    """What Picture Settings says: of the pixels of pictures, and of the sizes they get."""

    pixels: PictureSettings = DEFAULT_PICTURES
    step: int = STEP
    upscale: bool = True
    min_side: int = 0

    def dataset(self, subset: Subset) -> Dataset:
        """Of the pictures that are large enough."""
        return Dataset(subsets=(subset.without_small(self.min_side),))

    def resolution(self, width: int, height: int, mode: Mode) -> Resolution:
        return Resolution(
            width=width, height=height, mode=mode, step=self.step, upscale=self.upscale
        )


DEFAULT_CHOICES = PictureChoices()
QUANTIZE_ON = ("auto", "cpu", "gpu")


def _side(name: str, *, default: int) -> Any:
    return io.Int.Input(
        name,
        default=default,
        min=64,
        max=8192,
        step=STEP,
        tooltip=f"The {name} in pixels at which pictures are trained, a multiple of {STEP}. Time "
        "and memory grow with width x height.",
    )


_INPUTS: dict[str, Callable[..., Any]] = {
    "width": partial(_side, default=512),
    "height": partial(_side, default=768),
    "mode": partial(
        host.make_input,
        io.Combo,
        options=list(MODES),
        default="fixed",
        tooltip="fixed: every picture is cropped to width x height. The others have "
        "about as many pixels: buckets: the nearest of some shapes, so that batches "
        "fill. square: one square for all. preserved: each picture's own shape. "
        "random: any of the shapes, drawn for each picture.",
    ),
    "repeats": partial(
        host.make_input,
        io.Int,
        default=1,
        min=1,
        max=10000,
        tooltip="How often each picture is seen in one epoch: 1 is once, 10 is ten "
        "times. It only changes the balance between datasets, never the caches.",
    ),
    "trigger": partial(
        host.make_input,
        io.String,
        default="",
        tooltip="A word that will call up what is learned. It is put before every "
        "caption that does not contain it: 'sks, a dog on a beach'.",
    ),
    "missing_captions": partial(
        host.make_input,
        io.Combo,
        options=list(MISSING_CAPTIONS),
        default=MISSING_CAPTIONS[0],
        advanced=True,
        tooltip="A picture without a caption: stop with an error, use its file name "
        "(a_red_cat.png is 'a red cat'), or leave the caption empty.",
    ),
    "on_bad_file": partial(
        host.make_input,
        io.Combo,
        options=list(ON_BAD_FILE),
        default=ON_BAD_FILE[0],
        advanced=True,
        tooltip="A picture that is damaged or none, cannot be read, or whose caption or mask is "
        "wrong. stop: end with its name. skip: go on without it, and say so.",
    ),
    "captions": partial(
        host.make_input,
        AtelierCaptionSettings,
        optional=True,
        tooltip="Where captions come from and what is done with them, from Caption "
        "Settings. Without it: the text files, as they are.",
    ),
    "pictures": partial(
        host.make_input,
        AtelierPictureSettings,
        optional=True,
        tooltip="Crop, resampling and mirroring, from Picture Settings. Without it: "
        "the middle of each picture.",
    ),
    "lora_settings": partial(
        host.make_input,
        AtelierLoraSettings,
        optional=True,
        tooltip="Which kind of LoRA, on which layers and from where it starts, from LoRA Settings. "
        "In place of rank and targets.",
    ),
    "optimizer_settings": partial(
        host.make_input,
        AtelierOptimizerSettings,
        optional=True,
        tooltip="The optimizer and how its learning rate goes, from Optimizer Settings. Without "
        "it: AdamW8bit at a constant rate, as the recipe has it.",
    ),
    "schedule_settings": partial(
        host.make_input,
        AtelierFlowSettings,
        optional=True,
        tooltip="Which shares of noise are trained and how errors count, from Schedule Settings. "
        "Without it: all alike.",
    ),
    "preservation_settings": partial(
        host.make_input,
        AtelierPreservationSettings,
        optional=True,
        tooltip="What the model shall not forget, from Preservation Settings.",
    ),
    "speed_settings": partial(
        host.make_input,
        AtelierSpeedSettings,
        optional=True,
        tooltip="What makes a step cheaper in time or memory, from Speed Settings.",
    ),
    "rank": partial(
        host.make_input,
        io.Int,
        default=LoraSettings.rank,
        min=1,
        max=1024,
        tooltip="Size of the LoRA; its alpha is the same, so the scale is 1. 4 to 16 is "
        "usual for a style or a subject. More learns more detail and makes a larger file.",
    ),
    "targets": partial(
        host.make_input,
        io.Combo,
        options=list(LORA_TARGETS),
        default=LoraSettings.targets,
        tooltip="Which layers learn. qlora: the image's attention, as the recipe does. all: "
        "the text's attention too. all+ffs: every layer of the blocks but the modulation. The "
        "others are those of other trainers, by their names there: LoRA Settings explains them.",
    ),
    "batch_size": partial(
        host.make_input,
        io.Int,
        default=TrainSettings.batch_size,
        min=1,
        max=256,
        tooltip="Pictures computed at once, all of one size. Costs memory in proportion.",
    ),
    "gradient_accumulation": partial(
        host.make_input,
        io.Int,
        default=TrainSettings.gradient_accumulation,
        min=1,
        max=256,
        tooltip="Batches per step. Smooths the training like a larger batch, for time "
        "instead of memory; above 1 the LoRA's gradients stay in memory between batches.",
    ),
    "gradient_checkpointing": partial(
        host.make_input,
        io.Boolean,
        default=TrainSettings.gradient_checkpointing,
        tooltip="Compute each block a second time in the backward pass: far less memory, "
        "about a third more time. Does not change the result.",
    ),
    "activations_in_ram": partial(
        host.make_input,
        io.Boolean,
        default=JobSettings.activations_in_ram,
        tooltip="Keep in RAM what the backward pass needs of the forward pass: less memory "
        "of the GPU, somewhat slower. Use it with gradient_checkpointing. Does not change the "
        "result.",
    ),
    "compute_dtype": partial(
        host.make_input,
        io.Combo,
        options=list(COMPUTE_DTYPES),
        default=TrainSettings.compute_dtype,
        tooltip="Type of the arithmetic. auto: bf16 where the device is fast in it, fp16 "
        "with scaled gradients on older cards, fp32 on old CPUs. The LoRA itself is "
        "fp32, or bf16 with adamw_bf16.",
    ),
    "keep_copy": partial(
        host.make_input,
        io.Boolean,
        default=True,
        tooltip="Keep the quantized weights in output/atelier/packed (in nf4 6.5 GB for "
        "FLUX.1-dev, 2.7 GB for T5-XXL), so that the next load reads only them and quantizes "
        "nothing.",
    ),
    "quantize_on": partial(
        host.make_input,
        io.Combo,
        options=list(QUANTIZE_ON),
        default=QUANTIZE_ON[0],
        tooltip="Where the weights are quantized, one matrix after the other. auto: where "
        "ComfyUI computes. cpu takes some minutes, and no memory of the card.",
    ),
}


def shared_input(name: str, **options: Any) -> Any:
    """The input of this name; `options` are what the node adds, such as `advanced`."""
    return _INPUTS[name](name, **options)


def quantize_device(choice: str) -> torch.device:
    """The device behind a value of the input quantize_on.

    Raises:
        ValueError: if there is no such device.
    """
    device = host.compute_device()
    if choice == "gpu" and device.type == "cpu":
        raise ValueError(
            "There is no GPU to quantize on: this ComfyUI computes on the CPU. Set quantize_on to "
            "auto or cpu."
        )
    return torch.device("cpu") if choice == "cpu" else device


def sampler_inputs() -> list[Any]:
    """How pictures are sampled, with the names of KSampler."""
    return [
        io.Int.Input(
            "seed",
            default=Sampler.seed,
            min=0,
            max=2**53 - 1,
            control_after_generate=False,
            tooltip="Seed of all pictures: a KSampler with it gives the same ones.",
        ),
        io.Int.Input(
            "steps", default=Sampler.steps, min=1, max=1000, tooltip="Sampling steps of a picture."
        ),
        io.Combo.Input(
            "sampler_name",
            options=list(SAMPLERS),
            default=Sampler.name,
            tooltip="The sampler, as in KSampler.",
        ),
        io.Combo.Input(
            "scheduler",
            options=list(SCHEDULERS),
            default=Sampler.scheduler,
            tooltip="The scheduler, as in KSampler.",
        ),
    ]
