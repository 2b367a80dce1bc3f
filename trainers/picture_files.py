"""Pictures that come from no file of their own, kept as files that are named by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .config import require
from .files import write_atomically

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", 0, ".png"),
    (b"\xff\xd8\xff", 0, ".jpg"),
    (b"WEBP", 8, ".webp"),
    (b"BM", 0, ".bmp"),
)
"""First bytes of the formats of `scan.PICTURE_EXTENSIONS`, and where they stand."""


def write_picture_bytes(data: bytes, folder: Path, name: str) -> Path:
    """The file below `folder` that holds these bytes: it is written if it is not there.

    `name` is the picture's name for messages.

    Raises:
        ValueError: the bytes are none of a png, jpg, webp or bmp, or the disk refuses.
    """
    found = [extension for mark, at, extension in _SIGNATURES if data.startswith(mark, at)]
    require(
        bool(found),
        f"{name} is no png, jpg, webp or bmp picture. Convert or remove it.",
    )
    digest = hashlib.sha256(data).hexdigest()
    path = folder / digest[:2] / f"{digest}{found[0]}"
    if not path.is_file() or path.stat().st_size != len(data):
        write_atomically(path, lambda temporary: _write(temporary, data))
    return path


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
