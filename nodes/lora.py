"""Using LoRAs."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.block_weights import parse_block_weights
from ..trainers.lora_file import LoraTensors, lora_facts, read_lora
from . import host
from .lora_choice import FROM_WIRE, NONE, checked, chosen_lora, lora_file, lora_input, versions
from .lora_words import said_of, warned_of
from .native_lora import apply_lora, base_format
from .native_ranges import SamplingRange

NUM_SLOTS = 5
_NO_CLIP = (
    "The LoRA node has no CLIP to give: connect one to its clip input, or take the text encoders "
    "from where the MODEL came from."
)


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierApplyLoRA",
            display_name="Apply LoRA",
            category="Atelier/lora",
            description="Puts a LoRA on a MODEL: one just trained, or a file. On a quantized model "
            "nothing is merged, so a changed strength costs no time and no precision.",
            search_aliases=["lora loader", "load lora", "lora block weight"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL."),
                lora_input("lora_name", FROM_WIRE),
                _strength(
                    "strength", tooltip="1 is as trained, 0 is off, negative takes the style away."
                ),
                io.LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="The LoRA of Train LoRA, while lora_name says so.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For LoRAs that change the text encoders too; the node says when one "
                    "does.",
                ),
                _strength(
                    "strength_clip",
                    optional=True,
                    tooltip="The strength in the CLIP, where one is connected.",
                ),
                io.String.Input(
                    "block_weights",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Factors of the strength in parts of the MODEL, one in a line, such as "
                    "double_blocks.0-9: 0.5, or single_blocks: 0. The last line that fits a layer "
                    "holds; without one the factor is 1.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the sampling before which the MODEL has no LoRA.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Part of the sampling after which the MODEL has no LoRA.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the LoRA."),
                io.Clip.Output(tooltip="The CLIP with the LoRA, if one is connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        return checked(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None, **_: Any) -> list[tuple[str, int, int]]:
        return versions(lora_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength: float,
        lora: Any = None,
        clip: Any = None,
        strength_clip: float = 1.0,
        block_weights: str = "",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        tensors = chosen_lora("Apply LoRA", lora_name, lora)
        applied = apply_lora(
            model,
            tensors,
            strength,
            clip=clip,
            strength_clip=strength_clip,
            block_weights=parse_block_weights(block_weights),
            span=SamplingRange(start_percent=start_percent, end_percent=end_percent),
        )
        name, facts = _shown_name(tensors), lora_facts(tensors)
        said = said_of(name, applied, facts, strength, strength_clip)
        warned = warned_of(name, applied, facts, strength, base_format(model))
        shown = host.report(cls.hidden.unique_id, "\n".join(said), *warned)
        return io.NodeOutput(applied.model, _clip_output(applied.clip), ui=shown)


class LoraMixer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierLoRAMixer",
            display_name="LoRA Mixer",
            category="Atelier/lora",
            description="Puts several LoRA files on a MODEL, each with a weight. On a quantized "
            "model nothing is merged, so another mix costs no time and no precision.",
            search_aliases=["lora stack", "multiple loras", "set adapters", "style mix"],
            inputs=[
                io.Model.Input("model", tooltip="Any MODEL."),
                *_slots(),
                _strength("scale", tooltip="Times all weights."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="For LoRAs that change the text encoders too, with the same weights.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the LoRAs."),
                io.Clip.Output(tooltip="The CLIP with the LoRAs, if one is connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls,
        lora_1: str | None,
        lora_2: str | None,
        lora_3: str | None,
        lora_4: str | None,
        lora_5: str | None,
    ) -> bool | str:
        return checked(lora_1, lora_2, lora_3, lora_4, lora_5)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> list[tuple[str, int, int]]:
        return versions(*(inputs[f"lora_{number}"] for number in range(1, NUM_SLOTS + 1)))

    @classmethod
    def execute(cls, model: Any, scale: float, clip: Any = None, **slots: Any) -> io.NodeOutput:
        numbers = range(1, NUM_SLOTS + 1)
        mix = [(slots[f"lora_{n}"], slots[f"weight_{n}"]) for n in numbers]
        mix = [(name, weight * scale) for name, weight in mix if name != NONE]
        if not mix:
            raise ValueError(
                "The LoRA Mixer has no LoRA: choose at least one file, or take the node away."
            )
        format, said, warned = base_format(model), [], _repeated([name for name, _ in mix])
        for file, strength in mix:
            tensors = read_lora(lora_file(file))
            name = _shown_name(tensors)
            applied = apply_lora(model, tensors, strength, clip=clip, strength_clip=strength)
            model, clip, facts = applied.model, applied.clip, lora_facts(tensors)
            said += said_of(name, applied, facts, strength, strength)
            warned += warned_of(name, applied, facts, strength, format)
        shown = host.report(cls.hidden.unique_id, "\n".join(said), *warned)
        return io.NodeOutput(model, _clip_output(clip), ui=shown)


def _slots() -> list[Any]:
    inputs = []
    for number in range(1, NUM_SLOTS + 1):
        inputs += [
            lora_input(f"lora_{number}", NONE),
            _strength(f"weight_{number}", tooltip="1 is as trained, 0 is off."),
        ]
    return inputs


def _strength(name: str, *, tooltip: str, optional: bool = False) -> Any:
    return io.Float.Input(
        name, default=1.0, min=-10.0, max=10.0, step=0.05, optional=optional, tooltip=tooltip
    )


def _clip_output(clip: Any) -> Any:
    return host.blocked_output(_NO_CLIP) if clip is None else clip


def _shown_name(lora: LoraTensors) -> str:
    return f"'{lora.name}'" if lora.name else "The LoRA"


def _repeated(names: list[str]) -> list[str]:
    return [
        f"'{name}' is in the mix {names.count(name)} times: its weights add up."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
