"""Pictures that have no file of their own, kept as files: a dataset needs some to read again.

Each is named by its content, so the same picture is written once.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import numpy as np
from PIL import Image

from .checks import require
from .files import write_atomically
from .scan import PICTURE_EXTENSIONS, Picture

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", 0, ".png"),
    (b"\xff\xd8\xff", 0, ".jpg"),
    (b"WEBP", 8, ".webp"),
    (b"BM", 0, ".bmp"),
)
"""First bytes of the formats of `PICTURE_EXTENSIONS`, and where they stand."""
_COMPRESS_LEVEL = 1
"""Of PNG: twice as fast as the usual 4, for a few percent of size."""


class PictureFiles:
    """A folder of such pictures, and which of them were kept since this was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: set[str] = set()
        self._generation = ""

    def keep_bytes(self, data: bytes, name: str) -> Path:
        """The file that holds these bytes: it is written if it is not there.

        `name` is the picture's name for messages.

        Raises:
            ValueError: the bytes are none of a png, jpg, webp or bmp, or the disk refuses.
        """
        found = [extension for mark, at, extension in _SIGNATURES if data.startswith(mark, at)]
        require(
            bool(found),
            f"{name} is no png, jpg, webp or bmp picture. Convert or remove it.",
        )
        path = self._path(hashlib.sha256(data).hexdigest(), found[0])
        if not path.is_file() or path.stat().st_size != len(data):
            write_atomically(path, lambda temporary: _write(temporary, data))
        return path

    def keep_pixels(self, pixels: np.ndarray) -> Picture:
        """8-bit pixels [H, W] or [H, W, C] as PNG, under their hash: written if not there.

        Raises:
            ValueError: the disk is full or refuses.
        """
        digest = hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).hexdigest()
        path = self._path(digest, ".png")
        if not path.is_file():
            image = Image.fromarray(pixels)
            write_atomically(
                path,
                lambda temporary: image.save(temporary, "PNG", compress_level=_COMPRESS_LEVEL),
            )
        facts = path.stat()
        height, width = pixels.shape[:2]
        has_alpha = pixels.shape[2:] == (4,)
        return Picture(str(path), facts.st_size, facts.st_mtime_ns, width, height, has_alpha, 1)

    def generation(self) -> str:
        """Changes when a file is gone that was kept here before."""
        if not all(map(os.path.isfile, self._kept)):
            self._kept, self._generation = set(), uuid.uuid4().hex
        return self._generation

    def clear(self) -> int:
        """Remove every picture; returns the bytes that are free now."""
        freed = 0
        for path in self.folder.glob("??/*"):
            if path.suffix in PICTURE_EXTENSIONS:
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
        return freed

    def _path(self, digest: str, extension: str) -> Path:
        path = self.folder / digest[:2] / f"{digest}{extension}"
        self._kept.add(str(path))
        return path


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
