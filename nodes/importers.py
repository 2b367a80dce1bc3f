"""Nodes that read datasets which were made for other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainers.buckets import Mode
from ..trainers.captions import CaptionSettings
from ..trainers.dataset import DEFAULT_CAPTIONS
from ..trainers.hub import require_hub_id, snapshot
from ..trainers.hub_dataset import fetch_dataset, hub_folder, is_fetched
from ..trainers.import_dataset import imported_files, plan_import, read_import
from ..trainers.import_settings import CONFIG_EXTENSIONS, Places, Plan
from ..trainers.scan import PICTURE_EXTENSIONS
from . import folders, host
from .dataset import dataset_output, kept_pictures
from .inputs import DEFAULT_CHOICES, SIZE_AND_TRIGGER, PictureChoices, shared_input
from .wires import AtelierDataset


class ImportDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierImportDataset",
            display_name="Import Dataset",
            category="Atelier/dataset",
            description="A dataset configuration of kohya's sd-scripts (TOML), ai-toolkit (YAML) "
            "or SimpleTuner (JSON) as a dataset. What has no counterpart here is listed.",
            search_aliases=["kohya", "sd-scripts", "ai-toolkit", "simpletuner", "multidatabackend"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folders.dataset_files(CONFIG_EXTENSIONS),
                    tooltip="A configuration below ComfyUI's input folder. The folders that it "
                    "names must lie beside it or below input/ too. Repeats are converted: kohya's "
                    "and ai-toolkit's 1 is once per epoch, SimpleTuner's 0 is once. Press R to "
                    "list new files.",
                ),
                shared_input("on_bad_file"),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset",
                    tooltip="The description of the pictures, for Cache Latents and Encode "
                    "Prompts, with the schedule of each part.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None) -> bool | str:
        try:
            if file is not None:  # a linked input is not known yet
                _plan(file)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str, **_: Any) -> list[tuple[str, int, int]]:
        plan = _plan(file)
        return folders.fingerprints([folders.dataset_file(file), *imported_files(plan)])

    @classmethod
    def execute(cls, file: str, on_bad_file: str) -> io.NodeOutput:
        plan = _plan(file)
        dataset = read_import(
            plan,
            on_bad_file=on_bad_file,
            index_folder=folders.cache_folder("files"),
            on_progress=host.Progress().update,
        )
        return dataset_output(dataset, cls.hidden.unique_id, *plan.notes)


class HubDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierHubDataset",
            display_name="Hub Dataset",
            category="Atelier/dataset",
            description="A dataset in the form of the Hugging Face Hub: parquet files with the "
            "pictures inside, or pictures with metadata, also in subfolders. A folder below "
            "input/, or a repository.",
            search_aliases=["hugging face", "parquet", "imagefolder", "metadata.csv", "DiffSynth"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[_NO_FOLDER, *folders.dataset_trees((*PICTURE_EXTENSIONS, ".parquet"))],
                    tooltip="A folder below ComfyUI's input folder, with its subfolders. Parts "
                    "called test or validation are left out. Press R to list new folders.",
                ),
                *(shared_input(name) for name in SIZE_AND_TRIGGER),
                shared_input("missing_captions"),
                shared_input("on_bad_file"),
                shared_input("captions"),
                shared_input("pictures"),
                io.String.Input(
                    "hub_id",
                    default="",
                    optional=True,
                    tooltip="A dataset repository of the Hugging Face Hub, as owner/name, in place "
                    "of the folder. It is downloaded once, into the hub's own cache.",
                ),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset",
                    tooltip="The description of the pictures, for Cache Latents and Encode "
                    "Prompts.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None, hub_id: str | None = "") -> bool | str:
        try:
            if hub_id:
                require_hub_id(hub_id)
            elif folder is not None and hub_id is not None:  # a linked input is not known yet
                _local_folder(folder)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, hub_id: str = "", **_: Any) -> list[Any]:
        mark = kept_pictures(folders.cache_folder("pictures")).generation()
        if hub_id:
            is_there = is_fetched(hub_id, folders.cache_folder("files"))
            return [mark, str(snapshot(hub_id, "dataset")) if is_there else ""]
        return [mark, *folders.fingerprints(sorted(_local_folder(folder).rglob("*")))]

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
        on_bad_file: str,
        captions: CaptionSettings = DEFAULT_CAPTIONS,
        pictures: PictureChoices = DEFAULT_CHOICES,
        hub_id: str = "",
    ) -> io.NodeOutput:
        index, update = folders.cache_folder("files"), host.Progress().update
        subset = hub_folder(
            fetch_dataset(hub_id, index, update) if hub_id else _local_folder(folder),
            files=kept_pictures(folders.cache_folder("pictures")),
            resolution=pictures.resolution(width, height, mode),
            repeats=repeats,
            captions=dataclasses.replace(captions, trigger=trigger, missing=missing_captions),
            pictures=pictures.pixels,
            on_bad_file=on_bad_file,
            index_folder=index,
            on_progress=update,
        )
        if hub_id:
            subset = dataclasses.replace(subset, name=hub_id)
        return dataset_output(pictures.dataset(subset), cls.hidden.unique_id)


_NO_FOLDER = "none"


def _local_folder(name: str) -> Path:
    if name == _NO_FOLDER:
        raise ValueError("No folder is chosen, and hub_id is empty. Choose one, or name a dataset.")
    return folders.dataset_folder(name)


def _plan(file: str) -> Plan:
    return plan_import(
        Places(config=folders.dataset_file(file), roots=tuple(folders.dataset_roots()))
    )
