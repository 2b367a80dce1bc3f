"""The node that says what makes a training step cheaper."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.speed_settings import (
    CHECKPOINTING,
    PRODUCTS,
    SpeedSettings,
    TreadRoute,
    routes_from_text,
)
from . import host
from .wires import AtelierSpeedSettings

_TREAD_OFF = 0.0
_START, _END = 2, -2


class SpeedSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierSpeedSettings",
            display_name="Speed Settings",
            category="Atelier/training",
            description="What makes a training step cheaper, in time or in memory: image tokens "
            "that go around blocks (TREAD), which blocks are computed twice, compiled blocks, "
            "products in 8 bits. Each has its price, which its tooltip says.",
            search_aliases=["TREAD", "torch.compile", "gradient checkpointing", "fp8", "int8"],
            inputs=[*_tread_inputs(), *_compute_inputs()],
            outputs=[
                AtelierSpeedSettings.Output(
                    display_name="speed", tooltip="For the input speed_settings of Train LoRA."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        tread_ratio: float | None,
        tread_start: int | None,
        tread_end: int | None,
        more_routes: str | None,
        compile: bool | None,
        products: str | None,
    ) -> bool | str:
        if tread_ratio is None or tread_start is None or tread_end is None or more_routes is None:
            return True  # a linked input is not known yet
        try:
            _routes(tread_ratio, tread_start, tread_end, more_routes)
            if compile is not None and products is not None:
                SpeedSettings(compile=compile, products=products)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        tread_ratio: float,
        tread_start: int,
        tread_end: int,
        more_routes: str,
        **settings: Any,
    ) -> io.NodeOutput:
        routes = _routes(tread_ratio, tread_start, tread_end, more_routes)
        changed = {"tread_start": tread_start != _START, "tread_end": tread_end != _END}
        lines = [
            f"The setting {name} has no effect: tread_ratio is 0."
            for name, is_changed in changed.items()
            if is_changed and tread_ratio == _TREAD_OFF
        ]
        host.show_text("\n".join(lines), cls.hidden.unique_id)
        return io.NodeOutput(SpeedSettings(tread=routes, **settings))


def _routes(ratio: float, start: int, end: int, more: str) -> tuple[TreadRoute, ...]:
    if ratio == _TREAD_OFF:
        return routes_from_text(more)
    first = TreadRoute(selection_ratio=ratio, start_layer=start, end_layer=end)
    return first, *routes_from_text(more)


def _tread_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "tread_ratio",
            default=_TREAD_OFF,
            min=0.0,
            max=0.95,
            step=0.05,
            tooltip="TREAD: the share of the image tokens, drawn anew in each step, that goes "
            "around the blocks below. 0 is off. 0.5 around 9 of 12 blocks took 48 % of the time of "
            "a step (1024x1024 pixels, on a CPU, width 256, where attention weighs more than in "
            "FLUX.1), and needs less memory; the loss is higher at first, and detail is learned "
            "more slowly. 0.1 to 0.25 is careful. Small pictures gain no time: the demo's style, "
            "of 64 tokens, was learned 8 to 16 % worse (docs/methods.md).",
        ),
        io.Int.Input(
            "tread_start",
            default=_START,
            min=-1000,
            max=1000,
            tooltip="The first block that tokens go around. FLUX.1 has the blocks 0 to 56, the "
            "double ones first. Negative numbers count from the end.",
        ),
        io.Int.Input(
            "tread_end",
            default=_END,
            min=-1000,
            max=1000,
            tooltip="The last block that tokens go around; -2 is the last but one.",
        ),
        host.make_input(
            io.String,
            "more_routes",
            default="",
            multiline=True,
            advanced=True,
            tooltip="Further routes, one in a line: 0.25: 20 to 40 is a quarter of the tokens "
            "around the blocks 20 to 40. Routes must not overlap.",
        ),
    ]


def _compute_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "checkpointing",
            options=list(CHECKPOINTING),
            default=SpeedSettings.checkpointing,
            tooltip="With gradient_checkpointing, which blocks are computed twice. all: each. "
            "interval: several in a row as one, which may need more or less memory: see Estimate "
            "Memory. selective: only those whose activations do not fit into the VRAM that is "
            "free, up to a quarter faster. Does not change the result.",
        ),
        host.make_input(
            io.Int,
            "checkpointing_interval",
            default=SpeedSettings.checkpointing_interval,
            min=2,
            max=57,
            advanced=True,
            tooltip="For interval: how many blocks are one. More keep fewer inputs, and need more "
            "memory while they are computed again.",
        ),
        io.Boolean.Input(
            "compile",
            default=SpeedSettings.compile,
            tooltip="Compile the blocks with torch.compile, whatever the weights' format. The "
            "first step takes minutes longer, and again for new sizes of pictures; then steps are "
            "faster. Only numbers are rounded differently. Needs a C++ compiler on a CPU and "
            "Triton on a GPU, and products dequantized.",
        ),
        io.Combo.Input(
            "products",
            options=list(PRODUCTS),
            default=SpeedSettings.products,
            tooltip="8bit: the frozen weights of the blocks are multiplied in 8 bits, forward and "
            "backward, and never unpacked; the LoRA is not. Models in fp8 and bf16 need an RTX 40 "
            "or newer, in int8 an RTX 30. What goes into each layer is rounded too: an error of 3 "
            "% with fp8, of 1 % with int8 (7 % where a few channels are far larger than the rest), "
            "of 4 to 6 % with bf16, which saves no memory (torchao's float8 training). How much "
            "faster it is was not measured yet.",
        ),
    ]
