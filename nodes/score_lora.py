"""The node that measures a LoRA."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io

from ..trainers.checks import require
from ..trainers.config import TrainSettings
from ..trainers.data import TrainingData
from . import host
from .lora_choice import FROM_WIRE, checked, chosen_lora, lora_input, versions
from .lora_scores import Findings, measure_fit, measure_likeness, measure_loss
from .wires import AtelierDataset, AtelierLatentCache, AtelierPromptCache

_NOTHING = (
    "Score LoRA has nothing to measure. Connect model, latents and prompts for the loss; images, "
    "texts, clip and clip_vision for the picture–text score; images and dataset for the likeness."
)


class ScoreLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierScoreLoRA",
            display_name="Score LoRA",
            category="Atelier/lora",
            description="Measures a LoRA: its loss on pictures, best held out ones; how well what "
            "it drew fits the prompts; and whether it drew training pictures by heart. What is "
            "not connected is left out.",
            search_aliases=["evaluate lora", "clip score", "memorization", "overfitting", "loss"],
            inputs=_inputs(),
            outputs=[
                io.String.Output(display_name="report", tooltip="The report, a sentence a line."),
                io.String.Output(
                    display_name="values", tooltip="All numbers of the report, as JSON."
                ),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None) -> bool | str:
        return checked(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> list[tuple[str, int, int]]:
        return versions(lora_name)

    @classmethod
    def execute(
        cls, lora_name: str, strength: float, guidance: float, **given: Any
    ) -> io.NodeOutput:
        given["texts"] = given.get("texts", "").strip() or None
        inputs = {name: value for name, value in given.items() if value is not None}
        images, clip_vision = inputs.get("images"), inputs.get("clip_vision")
        findings = Findings()
        if findings.is_asked(inputs, ("latents", "prompts"), ("model",), _no_loss):
            data = TrainingData(latents=inputs["latents"], prompts=inputs["prompts"])
            tensors = chosen_lora("Score LoRA", lora_name, inputs.get("lora"))
            settings = {"strength": strength, "guidance": guidance}
            measure_loss(findings, inputs["model"], data, tensors, **settings)
        if findings.is_asked(inputs, ("texts", "clip"), ("images", "clip_vision"), _no_fit):
            measure_fit(findings, images, inputs["texts"], inputs["clip"], clip_vision)
        if findings.is_asked(inputs, ("dataset",), ("images",), _no_likeness):
            measure_likeness(findings, images, inputs["dataset"], clip_vision)
        require(bool(findings.values), _NOTHING)
        lines = [*findings.lines, *findings.warnings]
        ui = host.report(cls.hidden.unique_id, "\n".join(findings.lines), *findings.warnings)
        return io.NodeOutput("\n".join(lines), json.dumps(findings.values), ui=ui)


def _no_loss(missing: str) -> str:
    return f"The loss was not measured: it also needs {missing}."


def _no_fit(missing: str) -> str:
    return f"The picture–text score was not measured: it also needs {missing}."


def _no_likeness(missing: str) -> str:
    return f"The likeness to training pictures was not measured: it also needs {missing}."


def _inputs() -> list[Any]:
    return [
        lora_input("lora_name", FROM_WIRE),
        io.Float.Input(
            "strength",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            tooltip="The strength at which the loss is measured.",
        ),
        io.Float.Input(
            "guidance",
            default=TrainSettings.guidance,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance given to the model while the loss is measured: the one it was "
            "trained with.",
        ),
        io.Model.Input(
            "model", optional=True, tooltip="The MODEL without this LoRA, for the loss."
        ),
        io.LoraModel.Input(
            "lora",
            optional=True,
            tooltip="The LoRA of Train LoRA, while lora_name says so.",
        ),
        AtelierLatentCache.Input(
            "latents",
            optional=True,
            tooltip="Encoded pictures on which the loss is measured: best ones that were not "
            "trained, the held_out side of Split Dataset.",
        ),
        AtelierPromptCache.Input(
            "prompts", optional=True, tooltip="The encoded captions of these pictures."
        ),
        io.Image.Input("images", optional=True, tooltip="Pictures that the LoRA drew."),
        io.String.Input(
            "texts",
            default="",
            multiline=True,
            optional=True,
            tooltip="The prompts of the pictures: a line for each in their order, or one for all.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip="A CLIP with the text encoder that belongs to clip_vision, for the "
            "picture–text score.",
        ),
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="From Load CLIP Vision: for the picture–text score, and for the likeness also "
            "of pictures that differ in their pixels.",
        ),
        AtelierDataset.Input(
            "dataset",
            optional=True,
            tooltip="What it was trained on: each picture is compared with all of these.",
        ),
    ]
