"""What is remembered of files that do not change: rows of a JSON file, by name."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from .files import write_atomically

_VERSION = 1
"""Of the index files. Raise it when a row means something else."""
_SETTLED_NS = 2_000_000_000
"""A file can change twice within a tick of its file system's clock; FAT's is the coarsest, 2 s."""


def is_settled(mtime_ns: int) -> bool:
    """Whether a file that changed then and has the same time now has the same content."""
    return time.time_ns() - mtime_ns > _SETTLED_NS


def read_rows(file: Path, kinds: tuple[type, ...]) -> dict[str, tuple]:
    """Rows by name; none if the file is missing, damaged or of another version."""
    try:
        index: Any = json.loads(file.read_bytes())
        names, columns = index["names"], index["columns"]
        is_ours = index["version"] == _VERSION and set(map(type, names)) <= {str}
        is_whole = [(len(column), *set(map(type, column))) for column in columns] == [
            (len(names), kind) for kind in kinds
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return dict(zip(names, zip(*columns, strict=True), strict=True)) if is_ours and is_whole else {}


def write_rows(file: Path, rows: dict[str, tuple]) -> None:
    """Raises ValueError if the disk is full or refuses."""
    # Columns are read in half the time of rows. ASCII, since names on Linux may be no UTF-8.
    columns = list(zip(*rows.values(), strict=True))
    index = {"version": _VERSION, "names": list(rows), "columns": columns}
    text = json.dumps(index, separators=(",", ":"))
    write_atomically(file, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")
