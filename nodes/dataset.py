"""Nodes that say what is trained on: pictures, captions and masks as a description."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainers.buckets import Mode, parse_sizes
from ..trainers.captions import CaptionSettings
from ..trainers.config import Schedule
from ..trainers.dataset import DEFAULT_CAPTIONS, Dataset
from ..trainers.image_folder import image_folder, picture_files
from ..trainers.masks import ALPHA
from ..trainers.metadata_files import METADATA_FILES
from ..trainers.picture_files import PictureFiles
from ..trainers.scan import ON_BAD_FILE
from ..trainers.splitting import SPLIT_UNITS, SplitUnit, split_dataset
from . import folders, host
from .inputs import DEFAULT_CHOICES, SIZE_AND_TRIGGER, PictureChoices, shared_input
from .wires import AtelierDataset


class ImageFolderDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierImageFolderDataset",
            display_name="Image Folder Dataset",
            category="Atelier/dataset",
            description="Pictures of one folder below input/, each with a text file of the same "
            "name as its caption (cat.png and cat.txt). Everything is checked before training.",
            search_aliases=["training images", "captions", "load folder"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folders.dataset_folders(),
                    tooltip="A folder below ComfyUI's input folder that holds the pictures. Its "
                    "subfolders are not read. Press R to list new folders.",
                ),
                *(shared_input(name) for name in SIZE_AND_TRIGGER),
                shared_input("missing_captions"),
                shared_input("captions"),
                shared_input("pictures"),
                shared_input("on_bad_file", optional=True),
                host.make_input(
                    io.String,
                    "more_sizes",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="Further sizes at which every picture is trained too, such as "
                    "'768x768, 1024x1024'. Each picture is then seen once more in an epoch at each "
                    "of them, and cached once more.",
                ),
                host.make_input(
                    io.Combo,
                    "masks",
                    options=["none", ALPHA, *folders.dataset_folders()],
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="Which parts of the pictures are learned: white is, black is not. "
                    "alpha channel: what is not transparent. A folder: its pictures of the same "
                    "names and sizes.",
                ),
                host.make_input(
                    io.Combo,
                    "references",
                    options=["none", *folders.dataset_folders()],
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="For FLUX.1-Kontext, which learns edits: a folder with the picture "
                    "before each edit, under the same name. The captions say what to change. "
                    "References are cached too, and make a step take about twice the time and the "
                    "memory of its activations.",
                ),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset",
                    tooltip="The description of the pictures, for Cache Latents and Encode "
                    "Prompts. It holds no pixels.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None, more_sizes: str | None = "") -> bool | str:
        try:
            if folder is not None:  # a linked input is not known yet
                picture_files(folders.dataset_folder(folder))
            parse_sizes(more_sizes or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, folder: str, masks: str = "none", references: str = "none", **_: Any
    ) -> list[tuple[str, int, int]]:
        pictures = picture_files(folders.dataset_folder(folder))
        captions = [picture.with_suffix(".txt") for picture in pictures]
        tables = [pictures[0].with_name(name) for name in METADATA_FILES]
        mask_folder = _mask_folder(masks)
        weights = picture_files(mask_folder) if isinstance(mask_folder, Path) else []
        shown = _folder(references)
        before = picture_files(shown) if shown else []
        files = [*pictures, *captions, *tables, *weights, *before]
        return folders.fingerprints(files)

    @classmethod
    def execute(
        cls,
        folder: str,
        width: int,
        height: int,
        mode: Mode,
        repeats: int,
        trigger: str,
        missing_captions: str,
        captions: CaptionSettings = DEFAULT_CAPTIONS,
        pictures: PictureChoices = DEFAULT_CHOICES,
        on_bad_file: str = ON_BAD_FILE[0],
        more_sizes: str = "",
        masks: str = "none",
        references: str = "none",
    ) -> io.NodeOutput:
        subset = image_folder(
            folders.dataset_folder(folder),
            resolution=pictures.resolution(width, height, mode),
            repeats=repeats,
            captions=dataclasses.replace(captions, trigger=trigger, missing=missing_captions),
            pictures=pictures.pixels,
            masks=_mask_folder(masks),
            references=_folder(references),
            on_bad_file=on_bad_file,
            index_folder=folders.cache_folder("files"),
            on_progress=host.Progress().update,
        )
        dataset = pictures.dataset(subset).at_sizes(parse_sizes(more_sizes))
        return dataset_output(dataset, cls.hidden.unique_id)


class ScheduleDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierScheduleDataset",
            display_name="Schedule Dataset",
            category="Atelier/dataset",
            description="How a dataset takes its turn beside others: how often, from which step "
            "on, and whether it teaches or preserves. Before Combine Datasets.",
            search_aliases=["regularization", "class images", "probability", "sampling weight"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                AtelierDataset.Input("dataset", tooltip="The dataset to schedule."),
                io.Float.Input(
                    "probability",
                    default=0.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How many of the batches come from this dataset, in proportion to the "
                    "probabilities of the others, however many pictures each has. 0: every "
                    "picture in every epoch. Give one to each dataset, or to none.",
                ),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="The step of the training from which on its pictures are seen. At "
                    "least one dataset starts at 0.",
                ),
                io.Boolean.Input(
                    "is_regularization",
                    default=False,
                    tooltip="These pictures keep what the model can draw already: it learns to "
                    "draw them as it would without the LoRA. For pictures of the class, such as "
                    "other dogs.",
                ),
                host.make_input(
                    io.Boolean,
                    "is_prior",
                    default=False,
                    optional=True,
                    tooltip="These pictures are of the class of what is learned, such as other "
                    "dogs, and are learned as they are, with captions without the trigger: "
                    "DreamBooth's prior preservation. prior_weight of Preservation Settings says "
                    "how much. Costs no more than other pictures. Best are pictures that the model "
                    "drew; for others take is_regularization.",
                ),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset", tooltip="The same pictures, for Combine Datasets."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        probability: float,
        start_step: int,
        is_regularization: bool,
        is_prior: bool = False,
    ) -> io.NodeOutput:
        schedule = Schedule(probability=probability, start_step=start_step)
        return io.NodeOutput(
            dataset.scheduled(schedule, is_regularization=is_regularization, is_prior=is_prior)
        )


class CombineDatasets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierCombineDatasets",
            display_name="Combine Datasets",
            category="Atelier/dataset",
            description="Trains on several datasets at once, each with its own size, captions, "
            "repeats and schedule. A batch never mixes two of them. For more, combine again.",
            search_aliases=["merge datasets", "concepts", "multi dataset"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                AtelierDataset.Input(
                    f"dataset_{number}",
                    optional=number > 2,
                    tooltip="One of the datasets. Their order changes the order of the pictures.",
                )
                for number in range(1, 7)
            ],
            outputs=[
                AtelierDataset.Output(display_name="dataset", tooltip="All of their pictures.")
            ],
        )

    @classmethod
    def execute(cls, **datasets: Dataset) -> io.NodeOutput:
        combined = [datasets[name] for name in sorted(datasets)]
        subsets = tuple(subset for dataset in combined for subset in dataset.subsets)
        return dataset_output(Dataset(subsets=subsets), cls.hidden.unique_id)


class SplitDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierSplitDataset",
            display_name="Split Dataset",
            category="Atelier/dataset",
            description="Holds some pictures of a dataset out of the training, to measure on them "
            "what the LoRA learned. Which ones follows from their content, so they stay the same "
            "when pictures are added, and copies of one picture stay together.",
            search_aliases=["validation split", "held out", "evaluation", "eval loss", "test set"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                AtelierDataset.Input("dataset", tooltip="The dataset to split."),
                io.Int.Input(
                    "amount",
                    default=10,
                    min=1,
                    max=1_000_000,
                    tooltip="How much of each part of the dataset is held out, in the unit below; "
                    "at least one picture.",
                ),
                io.Combo.Input(
                    "unit",
                    options=list(SPLIT_UNITS),
                    default=SPLIT_UNITS[0],
                    tooltip="percent: of the pictures. pictures: their number. Copies count once.",
                ),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="training", tooltip="What is trained on, the larger part."
                ),
                AtelierDataset.Output(
                    display_name="held_out",
                    tooltip="What is not trained on, for Cache Latents and Encode Prompts of its "
                    "own.",
                ),
            ],
        )

    @classmethod
    def execute(cls, dataset: Dataset, amount: int, unit: SplitUnit) -> io.NodeOutput:
        training, held_out = split_dataset(dataset, amount, unit)
        counts = (
            f"Pictures to train on: {num_records(training)}, held out: {num_records(held_out)}."
        )
        shown = host.report(cls.hidden.unique_id, counts)
        return io.NodeOutput(training, held_out, ui=shown)


def dataset_output(dataset: Dataset, node_id: str, *notes: str) -> io.NodeOutput:
    """The dataset, and on the node how many pictures it has, `notes`, and what is probably not
    meant."""
    count = f"Pictures: {num_records(dataset)}, seen per epoch: {dataset.num_samples}."
    return io.NodeOutput(dataset, ui=host.report(node_id, count, *notes, *dataset.warnings))


def num_records(dataset: Dataset) -> int:
    return sum(len(subset.records) for subset in dataset.subsets)


@cache
def kept_pictures(folder: Path) -> PictureFiles:
    """One for each folder: it knows what was kept since ComfyUI started, as ComfyUI's own cache of
    outputs does."""
    return PictureFiles(folder)


def _mask_folder(masks: str) -> str | Path | None:
    """What `image_folder` takes for a choice of the input masks."""
    return ALPHA if masks == ALPHA else _folder(masks)


def _folder(name: str) -> Path | None:
    return None if name == "none" else folders.dataset_folder(name)
