"""How cached tensors lie on disk: safetensors files of many entries each, whose headers are the
index.

Only this file knows the layout; the caches speak of keys.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import write_atomically, write_safetensors
from .tensor_files import DTYPES, Entry, checksum, read_bytes, read_header

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 5.0
"""A shard is written when it has this size or age: what a crash loses is no more."""

_GENERATION = "generation"
_MARK = "atelier"

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Stored:
    """One tensor of an entry: where it lies, and its checksum in hex."""

    entry: Entry
    checksum: str

    def read(self) -> Tensor:
        """Raises ValueError if the bytes are not those that were written."""
        with self.entry.path.open("rb") as file:
            data = read_bytes(file, self.entry)
        if checksum(data).hex() != self.checksum:
            raise ValueError("checksum")
        return data.view(DTYPES[self.entry.dtype]).view(self.entry.shape)


class Shards:
    """Tensors by key in `<folder>/<random name>.safetensors`, each under `<key>.<its name>`.

    A shard appears complete or not at all and is never changed, so several processes may write the
    same folder. An entry that two of them wrote is there twice, and either is read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._shards: dict[str, dict[str, dict[str, _Stored]]] = {}
        """File name to key to name of a tensor."""
        self._index: dict[str, dict[str, _Stored]] = {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys without an entry, in order. Contents are checked by `read`."""
        self._refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def num_bytes(self, keys: Iterable[str]) -> int:
        """Bytes on disk of the entries that are there."""
        self._refresh()
        found = (self._index.get(key, {}) for key in set(keys))
        return sum(stored.entry.num_bytes for tensors in found for stored in tensors.values())

    @contextmanager
    def writing(self) -> Iterator[Callable[[str, Tensors], None]]:
        """A function that adds an entry of CPU tensors. Whatever ends the block, what was added
        before is written.

        Raises:
            ValueError: the disk is full or refuses the file; earlier shards stay.
        """
        pending: Tensors = {}
        size, began = 0, time.monotonic()

        def flush() -> None:
            nonlocal size, began
            if pending:
                self._write(pending)
            pending.clear()
            size, began = 0, time.monotonic()

        def add(key: str, tensors: Tensors) -> None:
            nonlocal size
            for name, tensor in tensors.items():
                pending[f"{key}.{name}"] = tensor
                size += tensor.nbytes
            if size >= SHARD_BYTES or time.monotonic() - began >= SHARD_SECONDS:
                flush()

        try:
            yield add
        finally:
            flush()

    def read(self, key: str) -> Tensors:
        """The tensors of `key`, on the CPU.

        Raises:
            ValueError: the entry is missing or damaged. A damaged one is removed, so that caching
                again encodes it anew.
        """
        if key not in self._index:
            self._refresh()
        stored = self._index.get(key)
        try:
            if stored is None:
                raise FileNotFoundError
            return {name: tensor.read() for name, tensor in stored.items()}
        except (FileNotFoundError, ValueError) as error:
            self._remove(key)
            self._advance_generation()
            raise ValueError(
                f"An entry of the cache {self.folder} is missing or damaged. Queue the graph "
                "again: only this one is encoded anew."
            ) from error
        except OSError as error:  # the file may be sound: too many open files, a lost network drive
            raise ValueError(f"Cannot read the cache {self.folder}: {error.strerror}.") from error

    def clear(self) -> int:
        """Remove every entry; returns the bytes that are free now."""
        paths = self._files()
        freed = sum(path.stat().st_size for path in paths)
        for path in paths:
            path.unlink(missing_ok=True)
        self._advance_generation()
        return freed

    def generation(self) -> str:
        """Changes when something that was here is gone. Makes its mark in a new folder."""
        mark = self.folder / _GENERATION
        if not mark.is_file():
            self._advance_generation()
        return mark.read_text(encoding="utf-8")

    def _advance_generation(self) -> None:
        mark = uuid.uuid4().hex
        write_atomically(self.folder / _GENERATION, lambda path: _write_text(path, mark))

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []

    def _refresh(self) -> None:
        """Read the headers of shards that are new, and forget those that are gone."""
        files = self._files()
        if {path.name for path in files} == self._shards.keys():
            return
        self._shards = {
            path.name: self._shards[path.name] if path.name in self._shards else _contents(path)
            for path in files
        }
        self._index = {key: t for shard in self._shards.values() for key, t in shard.items()}

    def _write(self, tensors: Tensors) -> None:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        sums = {
            name: checksum(tensor.view(-1).view(torch.uint8)).hex()
            for name, tensor in whole.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_safetensors(path, whole, {_MARK: json.dumps(sums, sort_keys=True)})

    def _remove(self, key: str) -> None:
        """Write the shard of an entry again, without it and without others that are damaged."""
        stored = self._index.pop(key, None)
        if stored is None:
            return
        path = next(iter(stored.values())).entry.path
        sound: Tensors = {}
        for other, tensors in self._shards.pop(path.name, {}).items():
            if other != key:
                try:
                    sound |= {f"{other}.{name}": t.read() for name, t in tensors.items()}
                except (OSError, ValueError):
                    continue
        if sound:
            self._write(sound)
        path.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _contents(path: Path) -> dict[str, dict[str, _Stored]]:
    """The whole entries of a shard by key; none of a file that is no shard."""
    try:
        entries, header = read_header(path, whole=False)
        sums = json.loads(header["__metadata__"][_MARK])
        size = path.stat().st_size
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    found: dict[str, dict[str, _Stored]] = {}
    cut = set()
    for full_name, entry in entries.items():
        key, _, name = full_name.rpartition(".")
        found.setdefault(key, {})[name] = _Stored(entry, sums.get(full_name, ""))
        if entry.start + entry.num_bytes > size:
            cut.add(key)
    return {key: tensors for key, tensors in found.items() if key not in cut}
