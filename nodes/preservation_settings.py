"""The node that says what a training shall not change, and which parts of pictures count."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.preservation_settings import PreservationSettings
from . import host
from .wires import AtelierPreservationSettings


class PreservationSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierPreservationSettings",
            display_name="Preservation Settings",
            category="Atelier/training",
            description="What the model shall not forget while it learns, and how masks count. "
            "Connect it to Train LoRA, and with a class word to Encode Prompts too.",
            search_aliases=[
                *("prior preservation", "dreambooth", "regularization", "class images"),
                *("masked loss", "differential output preservation", "dop"),
            ],
            inputs=[
                io.Float.Input(
                    "unmasked_weight",
                    default=PreservationSettings.unmasked_weight,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much the black parts of masks count. 0: not at all, and what is "
                    "drawn there may drift. 0.1 keeps some of their surroundings. 1: as if there "
                    "were no masks. Costs nothing.",
                ),
                io.Boolean.Input(
                    "normalize_masks",
                    default=PreservationSettings.normalize_masks,
                    tooltip="Count a picture alike, however small the white part of its mask is. "
                    "Off: by its area. Small white parts then make rougher steps. Costs nothing.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=PreservationSettings.prior_weight,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    tooltip="How much class pictures count, those of a dataset with is_prior of "
                    "Schedule Dataset. Less learns the subject faster, more keeps the class "
                    "better. Costs nothing itself; class pictures take steps of their own.",
                ),
                io.String.Input(
                    "trigger",
                    default=PreservationSettings.trigger,
                    tooltip="The words in captions that stand for what is learned, such as 'sks "
                    "dog'. With a class word: the class keeps its looks (differential output "
                    "preservation). Needs no class pictures; a step takes about 2.3 times as long, "
                    "and no more memory. Learning is slower too.",
                ),
                io.String.Input(
                    "class_word",
                    default=PreservationSettings.class_word,
                    tooltip="What the trigger is one of, such as 'dog'. Captions with it in place "
                    "of the trigger shall give what they gave without the LoRA. Connect this node "
                    "to Encode Prompts too, which encodes them.",
                ),
                io.Float.Input(
                    "class_weight",
                    default=PreservationSettings.class_weight,
                    min=0.01,
                    max=100.0,
                    step=0.05,
                    tooltip="How much it counts that captions with the class word give what they "
                    "gave. More keeps the class better and learns more slowly. Costs nothing.",
                ),
            ],
            outputs=[
                AtelierPreservationSettings.Output(
                    display_name="preservation_settings",
                    tooltip="For Train LoRA, and with a class word for Encode Prompts too.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, trigger: str | None = "", class_word: str | None = "") -> bool | str:
        if None in (trigger, class_word):  # a linked input is not known yet
            return True
        try:
            PreservationSettings(trigger=trigger, class_word=class_word)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(PreservationSettings(**settings))
