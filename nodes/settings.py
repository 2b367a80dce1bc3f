"""Nodes that only hold settings: what a dataset does with its captions and with its pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.buckets import STEP, STEPS
from ..trainers.captions import CAPTION_LINES, CAPTION_SOURCES, CaptionSettings
from ..trainers.dataset import PictureSettings
from ..trainers.pictures import CROPS, FILTERS
from . import host
from .inputs import PictureChoices
from .wires import AtelierCaptionSettings, AtelierPictureSettings


class CaptionSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierCaptionSettings",
            display_name="Caption Settings",
            category="Atelier/dataset",
            description="Where the captions of a dataset come from, and what is done with them: "
            "words before and after, tags in several orders, samples without a text. Every text is "
            "encoded once, so all of it works with cached embeddings.",
            search_aliases=["shuffle tags", "caption dropout", "metadata.jsonl", "prefix"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=list(CAPTION_SOURCES),
                    default=CAPTION_SOURCES[0],
                    tooltip="text file: cat.txt beside cat.png. file name: a_red_cat.png is 'a red "
                    "cat'. instance prompt: one text for all pictures. metadata file: "
                    "metadata.jsonl, .csv, .parquet or .json in the folder, as Hugging Face "
                    "datasets have it.",
                ),
                io.String.Input(
                    "instance_prompt",
                    default="",
                    tooltip="The caption of every picture, for the source of that name: 'a photo "
                    "of sks dog'.",
                ),
                io.String.Input(
                    "column",
                    default="",
                    tooltip="The column of a metadata file that holds the captions. Empty takes "
                    "text, else caption, else prompt.",
                ),
                io.Combo.Input(
                    "lines",
                    options=list(CAPTION_LINES),
                    default=CAPTION_LINES[0],
                    tooltip="one: a text file is one caption. each: every line of it is a caption, "
                    "and one of them is drawn for each sample. first: only its first line is.",
                ),
                io.String.Input(
                    "prefix", default="", tooltip="Text before every caption, never shuffled."
                ),
                io.String.Input(
                    "suffix", default="", tooltip="Text after every caption, never shuffled."
                ),
                io.Boolean.Input(
                    "shuffle",
                    default=False,
                    tooltip="Train with the tags of a caption in several orders. For lists of "
                    "tags, not for sentences.",
                ),
                io.Int.Input(
                    "keep_tokens",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="How many tags at the start keep their place when tags are shuffled; 1 "
                    "keeps the trigger word first.",
                ),
                io.Int.Input(
                    "variants",
                    default=8,
                    min=1,
                    max=1000,
                    tooltip="How many orders of a caption are used. Each is encoded once: time and "
                    "disk in proportion.",
                ),
                io.String.Input("separator", default=",", tooltip="What stands between two tags."),
                io.Float.Input(
                    "dropout",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the samples that train with an empty text. 0.05 to 0.1 keeps "
                    "the model able to draw without one.",
                ),
            ],
            outputs=[
                AtelierCaptionSettings.Output(
                    display_name="captions", tooltip="For the input captions of a dataset."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, source: str | None, instance_prompt: str | None, separator: str | None
    ) -> bool | str:
        if None in (source, instance_prompt, separator):  # a linked input is not known yet
            return True
        try:
            CaptionSettings(source=source, instance_prompt=instance_prompt, separator=separator)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, **settings: Any) -> io.NodeOutput:
        return io.NodeOutput(CaptionSettings(**settings))


class PictureSettingsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierPictureSettings",
            display_name="Picture Settings",
            category="Atelier/dataset",
            description="Which part of a picture is trained, how it is resampled and which sizes "
            "there are. A change encodes the pictures anew that it is about.",
            search_aliases=["crop", "flip", "mirror", "bucket"],
            inputs=[
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=CROPS[0],
                    tooltip="Which part is kept of a picture that has another shape than the size "
                    "it is trained at. random: a place of its own for each picture, always the "
                    "same.",
                ),
                io.Combo.Input(
                    "filter",
                    options=list(FILTERS),
                    default=FILTERS[0],
                    tooltip="How pictures are shrunk and enlarged. lanczos is sharper, bicubic "
                    "softer.",
                ),
                io.Int.Input(
                    "max_side",
                    default=0,
                    min=0,
                    max=65536,
                    tooltip="Pictures with a longer side are first shrunk to this many pixels. 0: "
                    "never. At least 64.",
                ),
                io.Boolean.Input(
                    "flip",
                    default=False,
                    tooltip="Train each picture also mirrored, every other time. It doubles the "
                    "cache. Not for faces, text or anything with a left and a right.",
                ),
                host.make_input(
                    io.Combo,
                    "step",
                    options=[str(step) for step in STEPS],
                    default=str(STEP),
                    optional=True,
                    advanced=True,
                    tooltip="Sides of the sizes are multiples of this many pixels. 64: fewer "
                    "shapes, so batches fill better and more is cropped.",
                ),
                host.make_input(
                    io.Boolean,
                    "enlarge",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Enlarge pictures that are smaller than their size. Off: they are "
                    "trained at a smaller size of the same shape.",
                ),
                host.make_input(
                    io.Int,
                    "min_side",
                    default=0,
                    min=0,
                    max=65536,
                    optional=True,
                    advanced=True,
                    tooltip="Leave out pictures with a side of fewer pixels than this. 0: none.",
                ),
            ],
            outputs=[
                AtelierPictureSettings.Output(
                    display_name="pictures", tooltip="For the input pictures of a dataset."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, max_side: int | None) -> bool | str:
        if max_side is None:  # a linked input is not known yet
            return True
        try:
            PictureSettings(max_side=max_side)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, step: str = str(STEP), enlarge: bool = True, min_side: int = 0, **pixels: Any
    ) -> io.NodeOutput:
        choices = PictureChoices(
            pixels=PictureSettings(**pixels), step=int(step), upscale=enlarge, min_side=min_side
        )
        return io.NodeOutput(choices)
