"""What a Compare Grid compares the MODEL with: LoRA files, and the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..trainers.adapters import file_tensors
from ..trainers.content_hashes import ContentHashes
from ..trainers.files import read_safetensors
from ..trainers.lora_file import read_lora
from ..trainers.lora_settings import LoraSettings
from ..trainers.run import adapter_file, lora_settings, steps_saved
from . import folders
from .lora_choice import lora_file, lora_names

NO_LORA = "none"


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is put on the MODEL: a LoRA's file, a checkpoint of a run, or nothing."""

    label: str
    path: Path | None = None
    settings: LoraSettings | None = None
    """Of the run, if the file is a checkpoint's."""

    def tensors(self) -> dict[str, Tensor]:
        """As of a LoRA file."""
        assert self.path is not None
        if self.settings is None:
            return read_lora(self.path)
        return file_tensors(read_safetensors(self.path)[0], self.settings)


def looks_of_files(lines: str) -> tuple[Look, ...]:
    """One for each line: the name of a LoRA file, or 'none'.

    Raises:
        ValueError: there is no such file.
    """
    names = [line.strip() for line in lines.splitlines() if line.strip()]
    return tuple(_look_of_file(name) for name in names)


def _look_of_file(name: str) -> Look:
    if name.lower() == NO_LORA:
        return Look(label="without LoRA")
    listed = {one.replace("\\", "/"): one for one in lora_names()}
    wanted = name.replace("\\", "/")
    found = listed.get(wanted) or listed.get(f"{wanted}.safetensors")
    if found is None:
        raise ValueError(
            f"There is no LoRA file '{name}'. Write its name as Apply LoRA lists it, one in each "
            f"line, or '{NO_LORA}'."
        )
    path = lora_file(found)
    return Look(label=found.removesuffix(".safetensors"), path=path)


def looks_of_run(folder: Path, steps: Sequence[int]) -> tuple[Look, ...]:
    """The checkpoints of a run, those of `steps` or all.

    Raises:
        ValueError: the run has none, or not these.
    """
    saved = steps_saved(folder)
    if not saved:
        raise ValueError(
            f"The run {folder.name} has no checkpoint. Train it further, or choose another run."
        )
    for step in steps:
        if step not in saved:
            there = ", ".join(map(str, saved))
            raise ValueError(
                f"The run {folder.name} has no checkpoint of step {step}. It has those of {there}."
            )
    settings = lora_settings(folder)
    return tuple(
        Look(
            label=f"step {step}",
            path=adapter_file(folder, step),
            settings=settings,
        )
        for step in steps or saved
    )


def content_digests(looks: Sequence[Look]) -> dict[Path, str]:
    """SHA-256 of each file, read once for each version of it."""
    hashes = ContentHashes.in_folder(folders.cache_folder("files"))
    paths = {look.path for look in looks if look.path}
    stats = [(path, path.stat()) for path in paths]
    found = {path: hashes.of(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats}
    hashes.save()
    return found
