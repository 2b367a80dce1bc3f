"""Dataset configurations of other trainers: from the file to a dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checks import require
from .dataset import Dataset, Subset
from .image_folder import image_folder
from .import_ai_toolkit import is_ai_toolkit, plan_ai_toolkit
from .import_kohya import is_kohya, plan_kohya
from .import_settings import FolderPlan, Places, Plan, read_config
from .import_simpletuner import is_simpletuner, plan_simpletuner
from .progress import OnProgress
from .scan import OnBadFile

_TOOLS: tuple[tuple[Callable[[Any], bool], Callable[[Any, Places], Plan]], ...] = (
    (is_kohya, plan_kohya),
    (is_ai_toolkit, plan_ai_toolkit),
    (is_simpletuner, plan_simpletuner),
)


def plan_import(places: Places) -> Plan:
    """What a configuration asks for; the trainer is known by the file's form.

    Raises:
        ValueError: the file is none of those known, or asks for what cannot be.
    """
    config = read_config(places.config)
    for is_tool, plan_of in _TOOLS:
        if is_tool(config):
            plan = plan_of(config, places)
            reasons = " ".join(plan.notes)
            require(
                bool(plan.folders),
                f"The file {places.config} names no folder of pictures to train on. {reasons}",
            )
            return plan
    raise ValueError(
        f"The file {places.config} is no dataset configuration that is known: of kohya's "
        "sd-scripts ([[datasets]] with subsets), ai-toolkit (datasets with folder_path) or "
        "SimpleTuner (a list of backends). Choose another file."
    )


def read_import(
    plan: Plan,
    *,
    on_bad_file: OnBadFile = "stop",
    index_folder: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """The pictures of all folders of a plan.

    Raises:
        ValueError: as `image_folder`.
    """
    subsets = []
    for folder in plan.folders:
        read = image_folder(
            folder.folder,
            resolution=folder.resolutions[0],
            repeats=folder.repeats,
            pictures=folder.pictures,
            captions=folder.captions,
            masks=folder.masks,
            references=folder.references,
            on_bad_file=on_bad_file,
            index_folder=index_folder,
            on_progress=on_progress,
            recursive=folder.recursive,
            written=folder.written,
            keep=folder.limits.allow if folder.limits else None,
        )
        subsets += (
            dataclasses.replace(
                read,
                resolution=resolution,
                schedule=folder.schedule,
                is_regularization=folder.is_regularization,
                is_prior=folder.is_prior,
            )
            for resolution in folder.resolutions
        )
    return _with_shares(Dataset(subsets=tuple(subsets)))


def imported_files(plan: Plan) -> list[Path]:
    """Everything that a change of may change the dataset, in a fixed order."""
    found: list[Path] = []
    for folder in plan.folders:
        found += [folder.table] if folder.table else []
        found += _files_in(folder.folder, folder)
        for other in (folder.masks, folder.references):
            found += _files_in(other, folder) if isinstance(other, Path) else []
    return found


def _files_in(path: Path, plan: FolderPlan) -> list[Path]:
    found: list[Path] = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(subfolders) if plan.recursive else []
        found += (Path(folder, name) for name in sorted(names))
    return found


def _with_shares(dataset: Dataset) -> Dataset:
    """Probabilities of single pictures as shares of the batches."""

    def share(subset: Subset) -> Subset:
        probability = subset.schedule.probability * subset.num_samples / dataset.num_samples
        schedule = dataclasses.replace(subset.schedule, probability=probability)
        return dataclasses.replace(subset, schedule=schedule)

    return Dataset(subsets=tuple(map(share, dataset.subsets)))
