"""How cached tensors lie on disk: safetensors files of many entries each, whose headers are the
index.

Only this file knows the layout; the caches speak of keys.
"""

from __future__ import annotations

import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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


@dataclass(frozen=True, slots=True)
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
        self._shards: dict[Path, list[str]] = {}
        """The keys in each file."""
        self._index: dict[str, Path] = {}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The distinct keys without an entry, in order. Contents are checked by `read`."""
        self._refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def require(self, keys: Iterable[str]) -> None:
        """Raises ValueError, as `read` does, if an entry is missing. Contents are not read."""
        for key in self.missing(keys)[:1]:
            self.read(key)  # also tells ComfyUI, by the generation, that it has to be made anew

    def num_bytes(self, keys: Iterable[str]) -> int:
        """Bytes on disk of the entries that are there."""
        self._refresh()
        wanted: dict[Path, list[str]] = {}
        for key in set(keys) & self._index.keys():
            wanted.setdefault(self._index[key], []).append(key)
        return sum(
            stored.entry.num_bytes
            for path, some in wanted.items()
            for key in some
            for stored in _contents(path)[key].values()
        )

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
                # A copy: a batch's tensors are views of one, and a file may not hold them twice.
                pending[f"{key}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
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
        try:
            stored = _contents(self._index[key])[key]
            return {name: tensor.read() for name, tensor in stored.items()}
        except (LookupError, FileNotFoundError, ValueError) as error:
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
        paths = self._files()
        if self._shards.keys() == set(paths):
            return
        self._shards = {path: self._shards.get(path) or _whole_keys(path) for path in paths}
        self._index = {key: path for path, keys in self._shards.items() for key in keys}

    def _write(self, tensors: Tensors) -> None:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        sums = {
            name: checksum(tensor.view(-1).view(torch.uint8)).hex()
            for name, tensor in whole.items()
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_safetensors(path, tensors, {_MARK: json.dumps(sums, sort_keys=True)})

    def _remove(self, key: str) -> None:
        """Write the shard of an entry again, without it and without others that are damaged."""
        path = self._index.pop(key, None)
        if path is None:
            return
        sound: Tensors = {}
        for other in self._shards.pop(path):
            if other != key:
                with suppress(OSError, ValueError, LookupError):
                    stored = _contents(path)[other]
                    sound |= {f"{other}.{name}": tensor.read() for name, tensor in stored.items()}
        if sound:
            self._write(sound)
        path.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _whole_keys(path: Path) -> list[str]:
    """The keys of a shard whose tensors all lie within the file; none if it is no shard."""
    try:
        entries, _ = read_header(path, whole=False)
        size = path.stat().st_size
    except (OSError, ValueError):
        return []
    ends = {name: entry.start + entry.num_bytes for name, entry in entries.items()}
    cut = {_key(name) for name, end in ends.items() if end > size}
    return [key for key in dict.fromkeys(map(_key, ends)) if key not in cut]


# Shards never change; entries are read in random order. So many are 128 GB of cache.
@functools.lru_cache(maxsize=2048)
def _contents(path: Path) -> dict[str, dict[str, _Stored]]:
    """Every tensor of a shard by key and name.

    Raises:
        ValueError, LookupError, OSError: if it is no shard.
    """
    entries, header = read_header(path, whole=False)
    sums = json.loads(header["__metadata__"][_MARK])
    found: dict[str, dict[str, _Stored]] = {}
    for full_name, entry in entries.items():
        name = full_name.rpartition(".")[2]
        found.setdefault(_key(full_name), {})[name] = _Stored(entry, sums[full_name])
    return found


def _key(full_name: str) -> str:
    return full_name.rpartition(".")[0]
