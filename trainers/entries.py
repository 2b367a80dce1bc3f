"""How cached tensors lie on disk: one checked safetensors file per key.

Only this file knows the layout; the caches speak of keys.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import write_atomically

_GENERATION = "generation"
_MARK = "atelier"  # one field of metadata: safetensors writes several in random order


class EntryFiles:
    """Tensors by key in `<folder>/<first two digits>/<key>.safetensors`.

    A file appears complete or not at all, so several processes may write the same folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys without a complete file, in order. Contents are checked by `read`."""
        return [key for key in dict.fromkeys(keys) if not self._is_complete(key)]

    def num_bytes(self, keys: Iterable[str]) -> int:
        return sum(os.path.getsize(self.path(key)) for key in set(keys))

    def write(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store contiguous CPU tensors under `key`, with a checksum.

        Raises:
            ValueError: the disk is full or refuses the file; nothing is left behind.
        """
        checksum = _checksum(safetensors.torch.save(tensors))
        data = safetensors.torch.save(tensors, {_MARK: f"{key} {checksum}"})
        write_atomically(self.path(key), lambda temporary: _write(temporary, data))

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of `key`, on the CPU.

        Raises:
            ValueError: the file is missing or damaged. A damaged one is removed, so that caching
                again encodes it anew.
        """
        path = self.path(key)
        try:
            return _checked(path.read_bytes(), key)
        except (FileNotFoundError, SafetensorError, ValueError, KeyError, TypeError) as error:
            path.unlink(missing_ok=True)
            self._advance_generation()
            raise ValueError(
                f"The cached file {path} is missing or damaged. Queue the graph again: "
                "only this one is encoded anew."
            ) from error
        except OSError as error:  # the file may be sound: too many open files, a lost network drive
            raise ValueError(f"Cannot read the cached file {path}: {error.strerror}.") from error

    def generation(self) -> str:
        """Changes when something that was here is gone. Makes its mark in a new folder."""
        mark = self.folder / _GENERATION
        if not mark.is_file():
            self._advance_generation()
        return mark.read_text(encoding="utf-8")

    def _advance_generation(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _GENERATION).write_text(uuid.uuid4().hex, encoding="utf-8")

    def _is_complete(self, key: str) -> bool:
        try:
            with safe_open(self.path(key), framework="pt") as file:  # compares header and length
                return (file.metadata() or {}).get(_MARK, "").startswith(key)
        except (OSError, SafetensorError):
            return False


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _data_start(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _checksum(data: bytes) -> str:
    return f"{zlib.crc32(memoryview(data)[_data_start(data) :]):08x}"


def _checked(data: bytes, key: str) -> dict[str, Tensor]:
    header = json.loads(data[8 : _data_start(data)])
    if header["__metadata__"][_MARK] != f"{key} {_checksum(data)}":
        raise ValueError("checksum")
    return safetensors.torch.load(data)
