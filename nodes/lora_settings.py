"""The node that says what kind of LoRA is trained, on which layers, and from where it starts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.lora_settings import (
    INITS,
    KINDS,
    LORA_TARGETS,
    REPLACED_BY_A_FILE,
    LoraSettings,
    replaced,
    without_effect,
)
from ..trainers.lora_start import read_start, settings_from
from ..trainers.lora_targets import FLUX_DEV, num_parameters, rank_without_effect
from . import host
from .inputs import shared_input
from .lora_choice import NONE, checked, lora_file, lora_names, versions
from .wires import AtelierLoraSettings


class LoraSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierLoRASettings",
            display_name="LoRA Settings",
            category="Atelier/training",
            description="What kind of LoRA is trained, on which layers, and from where it starts. "
            "The defaults are the Hugging Face QLoRA recipe. The base model never changes.",
            search_aliases=["lokr", "loha", "dora", "pissa", "olora", "loftq", "lycoris", "rank"],
            inputs=[*_size_inputs(), *_layer_inputs(), *_start_inputs()],
            outputs=[
                AtelierLoraSettings.Output(
                    display_name="lora_settings", tooltip="For Train LoRA and Estimate Memory."
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, start_from: str | None = None, **settings: Any) -> bool | str:
        if start_from != NONE:
            _take_replaced(settings)
        if all(value is not None for value in settings.values()):  # a linked one is not known yet
            try:
                _settings(**settings)
            except ValueError as error:
                return str(error)
        return checked(start_from)

    @classmethod
    def fingerprint_inputs(cls, start_from: str | None = None, **_: Any) -> list[Any]:
        return versions(start_from)

    @classmethod
    def execute(cls, start_from: str = NONE, **inputs: Any) -> io.NodeOutput:
        if start_from == NONE:
            settings = _settings(**inputs)
            lines = _facts(settings)
        else:
            given = _take_replaced(inputs)
            settings = settings_from(lora_file(start_from), _settings(**inputs))
            lines = [*_facts(settings), *replaced(given, settings)]
        host.show_text("\n".join(lines), cls.hidden.unique_id)
        return io.NodeOutput(settings)


def _take_replaced(inputs: dict[str, Any]) -> dict[str, Any]:
    """Take out what a file to start from says, and which need not fit together beside it."""
    taken = {name: inputs.pop(name) for name in REPLACED_BY_A_FILE if name in inputs}
    return {name: (value or None) if name == "alpha" else value for name, value in taken.items()}


def _settings(alpha: float = 0.0, **others: Any) -> LoraSettings:
    return LoraSettings(alpha=alpha or None, **others)


def _facts(settings: LoraSettings) -> list[str]:
    """What is shown on the node."""
    lines = []
    if settings.start_from:
        start = read_start(settings)
        lines.append(
            f"The file is a {'DoRA' if start.dora else settings.kind} of rank {start.rank} and "
            f"alpha {start.alpha:g} on {len(start.modules)} layers, which learn on."
        )
        if start.num_left:
            lines.append(
                f"Its {start.num_left} layers of text encoders are left out: only the transformer "
                "is trained."
            )
    else:
        try:
            millions = num_parameters(FLUX_DEV, settings) / 1e6
            lines.append(f"On FLUX.1-dev {millions:.2f} million numbers learn.")
            lines += rank_without_effect(FLUX_DEV, settings)
        except ValueError:  # patterns of another model; Train LoRA says whether they fit that
            lines.append("Not all of these layers are in FLUX.1-dev.")
    return [*lines, *without_effect(settings)]


def _size_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "kind",
            options=list(KINDS),
            default=LoraSettings.kind,
            tooltip="lora: two thin matrices, what every program reads. lokr: a Kronecker product, "
            "small files; SimpleTuner starts it at a learning rate of 1e-3 with AdamW, ten times a "
            "LoRA's; a step takes up to twice as long. loha: two LoRAs multiplied, time and "
            "memory of rank x rank. ComfyUI reads the last two, at some more time for each "
            "picture; diffusers does not.",
        ),
        shared_input("rank"),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=100_000.0,
            step=0.5,
            tooltip="The LoRA is scaled by alpha / rank; 0 takes the rank, a scale of 1. A smaller "
            "one needs a higher learning rate for the same. Costs nothing.",
        ),
        io.Combo.Input(
            "targets",
            options=list(LORA_TARGETS),
            default=LoraSettings.targets,
            tooltip="Which layers learn; more cost memory, time and a larger file. qlora and mmdit:"
            " the image's attention (18.7 million numbers at rank 16). all: the text's too (26.1). "
            "context: the text's alone (7.5); context+ffs: with its feed-forward (16.8). fal: all "
            "with both feed-forwards (44.8). all+ffs: every layer but the modulation (65.4). "
            "ai-toolkit, kohya: every layer of the blocks (85.9). tiny, nano: two layers, or one, "
            "for a style in seconds per step less (0.6, 0.3).",
        ),
    ]


def _layer_inputs() -> list[Any]:
    return [
        io.String.Input(
            "blocks",
            default="",
            tooltip="Learn in these blocks only, such as 'double_blocks.0-9, single_blocks.20-37'; "
            "empty is all. Fewer take less memory, and less time if the first ones are left out.",
        ),
        io.String.Input(
            "patterns",
            default="",
            tooltip="Layers that learn in place of targets: parts of their names, separated by "
            "commas, such as 'attn.to_q, ff.net' or 'img_attn.qkv'. * stands for any letters, 0-9 "
            "for numbers.",
        ),
        io.String.Input(
            "rank_patterns",
            default="",
            multiline=True,
            tooltip="Another rank for some layers, one 'pattern: rank' in each line, such as "
            "'attn.to_q: 16'; the last line that matches holds. Without alpha the scale stays 1.",
        ),
        io.Float.Input(
            "dropout",
            default=LoraSettings.dropout,
            min=0.0,
            max=0.99,
            step=0.01,
            tooltip="Share of a layer's inputs that the LoRA does not see in each step. 0.05 to "
            "0.1 against learning few pictures by heart; costs some memory and a slower start.",
        ),
        io.Boolean.Input(
            "rslora",
            default=LoraSettings.rslora,
            tooltip="Scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones. At "
            "rank 16 that is four times as strong: lower the learning rate.",
        ),
    ]


def _start_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "init",
            options=list(INITS),
            default=LoraSettings.init,
            tooltip="Where it starts. gaussian, default: at nothing, by diffusers' and by peft's "
            "random numbers. pissa: at the largest parts of the weights; olora: at their QR. Both "
            "learn faster at first, take that start off again, and save twice the rank. loftq: at "
            "what quantization took from the weights, read from the model's file; such a LoRA is "
            "for this format. The last three take minutes at the start.",
        ),
        io.Boolean.Input(
            "dora",
            default=LoraSettings.dora,
            tooltip="Learn the length of the weights' rows apart from their direction (DoRA): "
            "closer to a full training at low ranks. A step takes up to half longer, and pictures "
            "some more time.",
        ),
        io.Int.Input(
            "lokr_factor",
            default=LoraSettings.lokr_factor,
            min=-1,
            max=1024,
            tooltip="Of lokr: the size of its small factor. -1 is the largest, about the root: the "
            "smallest file. 4 to 16 learns more and makes a larger file.",
        ),
        io.Boolean.Input(
            "full_matrix",
            default=LoraSettings.full_matrix,
            tooltip="Of lokr: keep its large factor whole, whatever the rank, which learns most. "
            "With a factor of 16 on FLUX.1-dev about as much as a LoRA of rank 50.",
        ),
        io.Combo.Input(
            "start_from",
            options=[NONE, *lora_names()],
            default=NONE,
            tooltip="Go on from this LoRA file of any trainer: its kind, rank, alpha and layers "
            "are taken from it. Its content is part of the run. The file is only read.",
        ),
    ]
