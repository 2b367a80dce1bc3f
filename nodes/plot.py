"""A node that draws the loss of a training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..trainers.loss_plot import MIN_SIZE, loss_plot
from . import host


class PlotLoss(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierPlotLoss",
            display_name="Plot Loss",
            category="Atelier/training",
            description="Draws the loss of a training as a picture: every step faintly, and a "
            "smoothed curve on top. Takes the loss of Train LoRA and of ComfyUI's own trainer.",
            search_aliases=["loss graph", "loss curve", "training chart"],
            inputs=[
                io.LossMap.Input("loss", tooltip="The losses, from Train LoRA."),
                io.Float.Input(
                    "smoothing",
                    default=0.9,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    tooltip="How smooth the curve on top is: each loss weighs this part of the one "
                    "after it. 0: no curve on top; 0.9: about the last ten steps.",
                ),
                io.Boolean.Input(
                    "log_scale",
                    default=False,
                    tooltip="A logarithmic axis, which shows late small gains as large as early "
                    "ones. Losses that are not above 0 are left out.",
                ),
                io.Int.Input(
                    "width",
                    default=960,
                    min=MIN_SIZE[0],
                    max=4096,
                    tooltip="Pixels from left to right.",
                ),
                io.Int.Input(
                    "height",
                    default=540,
                    min=MIN_SIZE[1],
                    max=4096,
                    tooltip="Pixels from top to bottom.",
                ),
                io.String.Input(
                    "title",
                    default="",
                    optional=True,
                    tooltip="A line above the curve, such as the name of the LoRA.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture of the curve.")],
        )

    @classmethod
    def execute(
        cls,
        loss: dict[str, Any],
        smoothing: float,
        log_scale: bool,
        width: int,
        height: int,
        title: str = "",
    ) -> io.NodeOutput:
        picture = loss_plot(
            loss["loss"],
            smoothing=smoothing,
            log_scale=log_scale,
            size=(width, height),
            title=title,
        )
        return io.NodeOutput(torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None])
