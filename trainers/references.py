"""Reference pictures: what a FLUX.1-Kontext is shown beside the noise, in training and sampling.

The reference of a picture is a picture of the same name in a folder of references, such as the one
before an edit. It has a size of its own, by the rule that gives its picture one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .content_hashes import ContentHashes
from .paired_folder import has_subfolders, name_below, paired_folder
from .progress import OnProgress
from .scan import Picture


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a record's reference picture lies."""

    path: str
    """Absolute path."""
    content: str
    """SHA-256 of the file's bytes, in hex."""
    width: int
    """Pixels, after the EXIF rotation."""
    height: int
    """Pixels, after the EXIF rotation."""


def folder_references(
    pictures: Sequence[Picture],
    folder: str | Path,
    root: str,
    *,
    index_folder: Path | None,
    hashes: ContentHashes,
    on_progress: OnProgress | None,
) -> list[Reference | str]:
    """The reference of each picture: that of its path below `root` in `folder`, whatever the
    extension; or the sentence that says what is wrong.

    Raises:
        ValueError: the folder is missing, or two references have one name.
    """
    paired = paired_folder(
        folder,
        recursive=has_subfolders([*pictures], root),
        index_folder=index_folder,
        hashes=hashes,
        on_progress=on_progress,
    )

    def reference_of(picture: Picture) -> Reference | str:
        name = name_below(root, picture.path)
        found = paired.pictures.get(name)
        if found is None:
            missing = (
                f"The picture {picture.path} has no reference in {paired.folder}. Put the picture "
                "that it was made from there, under the same name."
            )
            return paired.bad.get(name, missing)
        return Reference(
            path=found.path,
            content=paired.contents[name],
            width=found.width,
            height=found.height,
        )

    return [reference_of(picture) for picture in pictures]
