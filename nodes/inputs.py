"""Inputs that several nodes have: one name, one range, one explanation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..trainers.config import (
    COMPUTE_DTYPES,
    LORA_TARGETS,
    JobSettings,
    LoraSettings,
    TrainSettings,
)
from . import host

QUANTIZE_ON = ("auto", "cpu", "gpu")

_INPUTS: dict[str, Callable[..., Any]] = {
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
        "the text's attention too. all+ffs: every layer of the blocks but the modulation.",
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
        "with scaled gradients on older cards, fp32 on old CPUs. The LoRA itself is always "
        "fp32.",
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
