"""The host's folders and the files in them: datasets, models, what is written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

import folder_paths

from ..trainers.run import run_name
from ..trainers.scan import PICTURE_EXTENSIONS
from ..trainers.status import read_status

_EMBEDDINGS = ("", ".safetensors", ".pt", ".bin")
DATASET_ROOTS_KEY = "atelier_datasets"
"""Key of extra_model_paths.yaml: folders besides input/ whose subfolders may be trained on."""


def atelier_output() -> Path:
    """Where caches and runs lie: output/atelier."""
    return Path(folder_paths.get_output_directory()) / "atelier"


def run_ids() -> list[str]:
    """The folders of all runs, the last one first."""
    times = {}
    for file in atelier_output().glob("*/run.json"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            times[file.parent.name] = file.stat().st_mtime
    return sorted(times, key=times.__getitem__, reverse=True)


def runs_that_went_on(name: str) -> list[tuple[str, str | None]]:
    """Id and LoRA file of the runs called `name` that were stopped and kept, and then resumed."""
    ids = [run_id for run_id in run_ids() if run_name(run_id) == name]
    found = {run_id: read_status(atelier_output() / run_id) for run_id in ids}
    return [(run_id, status.lora) for run_id, status in found.items() if status and status.went_on]


def cache_folder(kind: str) -> Path:
    """The folder of one kind of cache: `latents`, `prompts`, or what is known of `files`. It may
    not exist yet."""
    return atelier_output() / "cache" / kind


def dataset_roots() -> list[Path]:
    """input/, then the folders that the administrator added."""
    added = folder_paths.folder_names_and_paths.get(DATASET_ROOTS_KEY, ([],))[0]
    return [Path(folder_paths.get_input_directory()), *map(Path, added)]


def dataset_folders() -> list[str]:
    """Names of all folders below the dataset roots that hold pictures, with forward slashes."""
    names = set()
    for root in dataset_roots():
        for folder, _, files in os.walk(root):
            has_picture = any(name.lower().endswith(PICTURE_EXTENSIONS) for name in files)
            if has_picture and folder != str(root):
                names.add(Path(folder).relative_to(root).as_posix())
    return sorted(names)


def dataset_trees(extensions: tuple[str, ...]) -> list[str]:
    """Names of all folders below the dataset roots that hold, also deeper, files that end so."""
    parents = (PurePosixPath(name).parents for name in dataset_files(extensions))
    return sorted({str(folder) for folders in parents for folder in folders} - {"."})


def dataset_files(extensions: tuple[str, ...]) -> list[str]:
    """Names of all files below the dataset roots that end so, with forward slashes."""
    names = set()
    for root in dataset_roots():
        for folder, _, files in os.walk(root):
            found = (name for name in files if name.lower().endswith(extensions))
            names |= {Path(folder, name).relative_to(root).as_posix() for name in found}
    return sorted(names)


def dataset_file(name: str) -> Path:
    """The file called `name` below a dataset root.

    Raises:
        ValueError: there is none, or the name or a link leads out of the root.
    """
    path = _path_below(name)
    for root in dataset_roots() if path else []:
        file = root.joinpath(path)
        if file.is_file() and file.resolve().is_relative_to(root.resolve()):
            return file
    raise ValueError(
        f"The file {name!r} is not below {dataset_roots()[0]}. Put it there, or press R and choose "
        "another."
    )


def dataset_folder(name: str) -> Path:
    """The folder called `name` below a dataset root.

    Raises:
        ValueError: there is none, or the name or a link leads out of the root.
    """
    if not name:
        raise ValueError("No picture folder is chosen. Make one below input/ and put pictures in.")
    path = _path_below(name)
    if path is None:
        raise ValueError(
            f"The picture folder must lie below input/, got {name!r}. Choose one from the list."
        )
    for root in dataset_roots():
        folder = root.joinpath(path)
        if folder.is_dir():
            if not folder.resolve().is_relative_to(root.resolve()):
                raise ValueError(
                    f"The picture folder {name!r} is a link that leads out of {root}. Put the "
                    "pictures themselves there."
                )
            return folder
    raise ValueError(
        f"The picture folder {name!r} is not below {dataset_roots()[0]}. Put it there, or press R "
        "and choose another."
    )


def fingerprints(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of those of the files that are there."""
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _path_below(name: str) -> PurePosixPath | None:
    """A path, with slashes of either kind, if it leads down and nowhere else."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ":" in name or ".." in path.parts:
        return None
    return path


def model_file(kind: str, name: str) -> Path | None:
    """The file that ComfyUI's own loaders open for `name`, or None."""
    path = folder_paths.get_full_path(kind, name)
    return Path(path) if path else None


def model_names(kind: str) -> list[str]:
    """The names that ComfyUI lists for a kind of model, such as `diffusion_models`."""
    if kind not in folder_paths.folder_names_and_paths:
        return []
    return folder_paths.get_filename_list(kind)


def files_called(name: str) -> list[Path]:
    """The files of any kind of model that ComfyUI's loaders would open for `name`."""
    found = (model_file(kind, name) for kind in folder_paths.folder_names_and_paths)
    return sorted({path for path in found if path})


def embedding_folders() -> list[str]:
    """Where textual inversions lie."""
    return folder_paths.get_folder_paths("embeddings")


def embedding_files(text: str) -> list[Path]:
    """The files of the textual inversions that a prompt names, as in `embedding:my_style`."""
    names = [
        name.removesuffix(".safetensors") for name in re.findall(r"embedding:([\w./-]+)", text)
    ]
    found = (
        Path(root, f"{name}{end}")
        for root in embedding_folders()
        for name in names
        for end in _EMBEDDINGS
    )
    return sorted(path for path in found if path.is_file())


def diffusers_folders() -> dict[str, Path]:
    """Folders in diffusers' layout below models/diffusers, by name."""
    roots = [Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    folders = [folder for root in roots if root.is_dir() for folder in sorted(root.iterdir())]
    return {folder.name: folder for folder in folders if (folder / "transformer").is_dir()}


def lora_folder() -> Path:
    """Where LoRAs are written: output/loras, which every LoRA loader lists."""
    folder = Path(folder_paths.get_output_directory()) / "loras"
    if str(folder) not in folder_paths.get_folder_paths("loras"):
        folder_paths.add_model_folder_path("loras", str(folder))
    return folder


def numbered_file(prefix: str, extension: str) -> Path:
    """A new file of the output folder, named as ComfyUI's saving nodes do: the prefix and the next
    number.

    Raises:
        ValueError: if the prefix leads out of the output folder.
    """
    if _path_below(prefix) is None:
        raise ValueError(
            f"The file name must lie below the output folder, got {prefix!r}. Use a name such as "
            "'diffusion_models/my_model'."
        )
    folder, name, number, *_ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{number:05}_{extension}"
