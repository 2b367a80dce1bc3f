"""A node that trains on the pictures of any graph."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io

from ..trainers.dataset import DEFAULT_CAPTIONS
from ..trainers.graph_pictures import graph_pictures
from . import folders, host
from .dataset import dataset_output, kept_pictures
from .inputs import DEFAULT_CHOICES, SIZE_AND_TRIGGER, shared_input
from .wires import AtelierDataset


class ImagesToDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierImagesToDataset",
            display_name="Images to Dataset",
            category="Atelier/dataset",
            description="Trains on images that other nodes load, generate or edit, with their "
            "captions. The pictures are kept as files in output/atelier/cache/pictures.",
            search_aliases=["image batch", "image list", "train on generated images"],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "images",
                    tooltip="The pictures: a batch, or a list of pictures of any sizes. What is "
                    "transparent is laid over white.",
                ),
                io.String.Input(
                    "texts",
                    default="",
                    multiline=True,
                    tooltip="The captions: one for all pictures, or a list with one for each, in "
                    "the order of the images.",
                ),
                *(shared_input(name) for name in SIZE_AND_TRIGGER),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Which parts of the pictures are learned: white is, black is not. One "
                    "mask for each picture, of its size.",
                ),
                shared_input(
                    "captions",
                    tooltip="What is done with the captions, from Caption Settings; its source has "
                    "no effect here. Without it: the texts, as they are.",
                ),
                shared_input("pictures"),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset",
                    tooltip="The pictures and captions, for Cache Latents and Encode Prompts.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return kept_pictures(folders.cache_folder("pictures")).generation()

    @classmethod
    def execute(
        cls,
        images: list[Any],
        texts: list[str],
        masks: list[Any] | None = None,
        **settings: list[Any],
    ) -> io.NodeOutput:
        one = {name: values[0] for name, values in settings.items()}
        captions = one.get("captions") or DEFAULT_CAPTIONS
        pictures = one.get("pictures") or DEFAULT_CHOICES
        subset = graph_pictures(
            [image for batch in images for image in batch],
            texts,
            kept_pictures(folders.cache_folder("pictures")),
            masks=[mask for batch in masks or [] for mask in batch.reshape(-1, *batch.shape[-2:])],
            resolution=pictures.resolution(one["width"], one["height"], one["mode"]),
            repeats=one["repeats"],
            captions=dataclasses.replace(captions, trigger=one["trigger"]),
            pictures=pictures.pixels,
            index_folder=folders.cache_folder("files"),
            on_progress=host.Progress().update,
        )
        return dataset_output(pictures.dataset(subset), cls.hidden.unique_id)
