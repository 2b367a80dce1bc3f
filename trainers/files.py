"""Files that are whole or not there: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

_WRITING_S = 60
"""A file that is being written changes more often than that."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    Raises:
        ValueError: if the disk is full or refuses; what stood at `path` before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _sync(temporary)
        _replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # it is gone when all went well
            temporary.unlink()


def clear_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` left of it."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # gone meanwhile
            if time.time() - leftover.stat().st_mtime > _WRITING_S:
                leftover.unlink()


def _replace(temporary: Path, path: Path) -> None:
    """Windows refuses it while somebody reads `path`, as pages do: try for a second."""
    for _ in range(20):
        with suppress(PermissionError):
            temporary.replace(path)
            return
        time.sleep(0.05)
    temporary.replace(path)


def read_bytes(path: str | Path) -> bytes:
    """All of a file that a user gave.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise not_read(path, error) from error


def not_read(path: str | Path, error: OSError) -> ValueError:
    """What a user should read when the operating system refuses to read `path`."""
    return ValueError(f"Cannot read the file {path}: {error.strerror}.")


def not_written(path: Path, error: OSError) -> ValueError:
    """What a user should read when the operating system refuses to write `path`."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):  # Windows has no quota error
        return ValueError(
            f"The disk of {path.parent} is full. Free some space and queue again: "
            "what was saved before is kept."
        )
    return ValueError(
        f"Cannot write {path}: {error.strerror}. See to it that this folder can be written to, and "
        "queue again."
    )


def require_room(folder: Path, num_bytes: int, limit_bytes: int | None = None) -> None:
    """See that `num_bytes` more may be cached in `folder`, before anything is computed for it.

    Raises:
        ValueError: if it is more than the limit, or than the disk has free.
    """
    if limit_bytes is not None and num_bytes > limit_bytes:
        raise ValueError(
            f"Caching this would take {_readable(num_bytes)} more, and limit_gb allows "
            f"{_readable(limit_bytes)}. Raise limit_gb, or make it smaller: fewer or smaller "
            "sizes, latents as one sample, fewer caption variants, a shorter length."
        )
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise ValueError(
            f"Caching this would take {_readable(num_bytes)} more, and the disk of {folder} has "
            f"{_readable(free)} free. Free some space, or make it smaller: fewer or smaller sizes, "
            "latents as one sample, fewer caption variants, a shorter length."
        )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors and metadata, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:
            # The library wraps the operating system's error as text.
            is_full = "No space left" in str(error) or "StorageFull" in str(error)
            raise OSError(errno.ENOSPC if is_full else errno.EIO, str(error)) from error

    write_atomically(path, write)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU and metadata.

    Raises:
        ValueError: if the file is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a safetensors file: {error}. Replace it or choose another."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable; Windows has no such call and does it by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
