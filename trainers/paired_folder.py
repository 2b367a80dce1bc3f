"""A second folder whose pictures belong to those of a dataset by their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .checks import require
from .content_hashes import ContentHashes
from .progress import OnProgress
from .scan import Picture, scan_folder


@dataclass(frozen=True, kw_only=True)
class PairedFolder:
    """Its pictures by their paths below it, without the extensions."""

    folder: str
    """Absolute path."""
    pictures: Mapping[str, Picture]
    contents: Mapping[str, str]
    """SHA-256 of the files' bytes, in hex."""
    bad: Mapping[str, str]
    """What is wrong with files that are no pictures."""


def paired_folder(
    folder: str | Path,
    *,
    recursive: bool,
    index_folder: Path | None,
    hashes: ContentHashes,
    on_progress: OnProgress | None,
) -> PairedFolder:
    """Read the folder.

    Raises:
        ValueError: the folder is missing, or two of its pictures have one name.
    """
    scan = scan_folder(
        folder, index_folder, recursive=recursive, on_bad_file="skip", on_progress=on_progress
    )
    by_name: dict[str, Picture] = {}
    for picture in scan.pictures:
        other = by_name.setdefault(name_below(scan.folder, picture.path), picture)
        require(
            other is picture,
            f"Two pictures have one name: {other.path} and {picture.path}. Remove one of them.",
        )
    contents = hashes.of_all([*by_name.values()], on_progress).digests
    return PairedFolder(
        folder=scan.folder,
        pictures=by_name,
        contents=dict(zip(by_name, contents, strict=True)),
        bad={name_below(scan.folder, path): sentence for path, sentence in scan.skipped},
    )


def name_below(folder: str, path: str) -> str:
    """The path below the folder, without the extension."""
    return os.path.splitext(path[len(os.path.join(folder, "")) :])[0]


def has_subfolders(pictures: list[Picture], root: str) -> bool:
    """Whether some of the pictures lie deeper than directly in `root`."""
    return any(os.path.dirname(picture.path) != root for picture in pictures)
