"""Removing what the caches hold."""

from __future__ import annotations

from pathlib import Path

from .checks import require
from .picture_files import PictureFiles
from .shards import Shards

CACHES = ("latents", "prompts", "files", "pictures")
"""Subfolders of the cache: encoded pictures, encoded texts, the sizes and hashes of files, and the
pictures that came out of graphs and parquet files."""


def clear_caches(folder: str | Path, what: str) -> int:
    """Empty one of CACHES below `folder`, or `all` of them; returns the bytes that are free now.

    Nothing is lost but time: what is missing is made again when it is needed.

    Raises:
        ValueError: there is no such cache, no such folder, or a file cannot be removed.
    """
    require(
        what in (*CACHES, "all"),
        f"There is no cache {what!r}. Choose one of {', '.join(CACHES)}, or all.",
    )
    folder = Path(folder)
    require(
        folder.is_dir(),
        f"The folder {folder} does not exist, so there is no cache to clear. Name the output "
        "folder of your ComfyUI.",
    )
    try:
        return sum(_clear(folder / name) for name in (CACHES if what == "all" else (what,)))
    except OSError as error:
        raise ValueError(
            f"Cannot remove {error.filename}: {error.strerror}. Close what uses it, and clear the "
            "cache again."
        ) from error


def _clear(folder: Path) -> int:
    freed = PictureFiles(folder).clear()
    for path in folder.glob("*.json"):
        freed += path.stat().st_size
        path.unlink(missing_ok=True)
    return freed + (Shards(folder).clear() if folder.is_dir() else 0)
