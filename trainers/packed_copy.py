"""Quantized copies on disk: what a load packed, so that the next one reads only the packed bytes.

One safetensors file per source and format, with a record of both as JSON in its metadata.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import write_atomically
from .offload import Layout, blocks_of
from .packed_weight import PackedWeight
from .store import WeightStore
from .tensor_files import (
    DTYPES,
    Entry,
    checksum,
    data_layout,
    read_bytes,
    read_header,
    write_header,
)

LAYOUT_VERSION = 2
"""Raise it when the bytes of a format change, so that no older copy is read."""
MIN_SOURCE_BYTES = 256 << 20
"""Smaller models get no copy: they are quantized within seconds."""
_DISK_RESERVE = 1 << 30
"""Bytes that a copy leaves free, for the checkpoints and pictures of the run that follows."""
_READERS = 2
"""Threads that read a copy: what the system does for new memory takes longer than a fast disk."""
_MARK = "atelier"

logger = logging.getLogger("atelier")

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class CopyKey:
    """What a copy was made from, and how."""

    source: Path
    identity: str
    format: str

    @property
    def name(self) -> str:
        """One name per place of a source and format, so that a new copy replaces the old one."""
        place = hashlib.sha256(os.path.abspath(self.source).encode()).hexdigest()[:8]
        return f"{self.source.name.removesuffix('.safetensors')}-{place}-{self.format}.safetensors"

    def to_json(self) -> dict[str, Any]:
        return {"version": LAYOUT_VERSION, "source": self.identity, "format": self.format}


class PackedCopies:
    """The copies in one folder.

    Args:
        writes: whether new ones are made.
    """

    def __init__(
        self, folder: Path, min_source_bytes: int = MIN_SOURCE_BYTES, *, writes: bool = True
    ) -> None:
        self.folder = folder
        self.writes = writes
        self._min_source_bytes = min_source_bytes

    def is_worthwhile(self, source_bytes: int) -> bool:
        return source_bytes >= self._min_source_bytes

    def read(
        self, key: CopyKey, device: torch.device, on_progress: OnProgress
    ) -> WeightStore | None:
        """The store that was written under `key`, on `device`, or None.

        A copy of another source or version, or one with any byte changed, is removed.

        Raises:
            ValueError: if the copy is sound, but its numbers do not exist on `device`.
        """
        store = self._read(key, on_progress, blocks_stay=False)
        if store is not None:
            store.place(device)
        return store

    def read_without_blocks(self, key: CopyKey, on_progress: OnProgress) -> WeightStore | None:
        """As `read`, but the matrices of blocks stay in the file and are read when they are used.
        It is read once all the same, to know that it is whole."""
        return self._read(key, on_progress, blocks_stay=True)

    def _read(
        self, key: CopyKey, on_progress: OnProgress, *, blocks_stay: bool
    ) -> WeightStore | None:
        path = self.folder / key.name
        if not path.is_file():
            return None
        try:
            return _read(path, key, on_progress, blocks_stay=blocks_stay)
        except OSError as error:  # the file may be sound: too many open files, a lost network drive
            logger.warning(f"Cannot read the quantized copy {path}: {error.strerror}.")
        except (ValueError, LookupError, TypeError, AttributeError):  # a header may hold anything
            logger.info(f"The quantized copy {path} is old or damaged: it is made again.")
            with suppress(OSError):  # Windows, while another process reads it
                path.unlink()
        return None

    def write(self, key: CopyKey, store: WeightStore, on_progress: OnProgress) -> None:
        """Keep `store` under `key`, whole or not at all; what prevents it is only logged."""
        path = self.folder / key.name

        def write(temporary: Path) -> None:
            free = shutil.disk_usage(temporary.parent).free
            if free < store.num_bytes + _DISK_RESERVE:
                raise ValueError(
                    f"It takes {store.num_bytes / 1e9:.1f} GB, and the disk of {self.folder} has "
                    f"{free / 1e9:.1f} GB free, of which {_DISK_RESERVE / 1e9:.1f} are left alone."
                )
            with temporary.open("wb") as file:
                _write(file, key, store, on_progress)

        try:
            write_atomically(path, write)
        except ValueError as error:
            logger.warning(
                "The model is loaded, but no quantized copy of it was kept, so the next load "
                f"quantizes it again. {error}"
            )
        else:
            logger.info(f"The next load of this model reads its quantized copy {path}.")


@dataclass(frozen=True)
class BlockInCopy:
    """The matrices of one block in a copy, with their checksums of when it was opened."""

    path: Path
    parts: dict[str, tuple[Entry, bytes]]

    def read(self, layout: Layout, target: Tensor) -> None:
        """Read the bytes to their places in `target`, in RAM.

        Raises:
            ValueError: if any byte is not as it was, or the file is gone.
        """
        try:
            with self.path.open("rb") as file:
                for name, (entry, wanted) in self.parts.items():
                    data = layout.pieces[name].bytes_of(target)
                    file.seek(entry.start)
                    is_whole = file.readinto(data.numpy().data) == entry.num_bytes
                    if not is_whole or checksum(data) != wanted:
                        raise ValueError("changed")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"The quantized copy '{self.path}' was deleted or changed while the model computed "
                "from it. Load the model again, which makes the copy anew: in ComfyUI, press Free "
                "Model and Node Cache, and queue again."
            ) from error


def _read(path: Path, key: CopyKey, on_progress: OnProgress, *, blocks_stay: bool) -> WeightStore:
    """The store, on the CPU, so that what a device cannot hold is no fault of the copy.

    Raises ValueError, or what a header with wrong values leads to, if the copy is of no use.
    """
    entries, header = read_header(path)
    record = json.loads(header.pop("__metadata__")[_MARK])
    content, weights = record.pop("content"), record["weights"]
    # Before sizes and places out of the header are trusted.
    if record != {**key.to_json(), "weights": weights, "header": _header_hash(header, weights)}:
        raise ValueError("made from something else")
    digest = hashlib.sha256()
    tensors: dict[str, Tensor] = {}
    blocks = blocks_of(_tensor_names(weights, entries)) if blocks_stay else []
    staying = {name for names in blocks for name in names}
    checksums: dict[str, bytes] = {}
    pool = ThreadPoolExecutor(_READERS)
    try:
        reads = pool.map(_read_and_sum, entries.values())
        # Outside inference mode, in which the host runs its nodes: see packed_weight._FrozenLinear.
        with torch.inference_mode(False):
            for name, (data, data_sum) in zip(entries, reads, strict=True):
                entry, checksums[name] = entries[name], data_sum
                digest.update(data_sum)
                data = data.view(DTYPES[entry.dtype])
                if name in staying:
                    tensors[name] = torch.zeros_like(data[:1]).expand(entry.shape)
                else:
                    tensors[name] = data.view(entry.shape)
                on_progress(len(checksums), len(entries))
    finally:
        pool.shutdown(cancel_futures=True)
    if digest.hexdigest() != content:
        raise ValueError("damaged")
    packed = {
        name: PackedWeight(format, tensors.pop(name), tensors.pop(f"{name}.scale", None), columns)
        for name, (format, columns) in weights.items()
    }
    on_disk = [
        BlockInCopy(path, {name: (entries[name], checksums[name]) for name in names})
        for names in blocks
    ]
    return WeightStore(packed, tensors, on_disk=on_disk)


def _read_and_sum(entry: Entry) -> tuple[Tensor, bytes]:
    with entry.path.open("rb") as file:
        data = read_bytes(file, entry)
    return data, checksum(data)


def _tensor_names(weights: dict[str, Any], entries: dict[str, Entry]) -> list[str]:
    """Of all matrices: their bytes and their scales."""
    ends = ("", ".scale")
    return [f"{name}{end}" for name in weights for end in ends if f"{name}{end}" in entries]


def _write(file: BufferedWriter, key: CopyKey, store: WeightStore, on_progress: OnProgress) -> None:
    """One pass over the store, one tensor in host memory at a time."""
    tensors = _tensors(store)
    header = data_layout([(name, tensor.dtype, tensor.shape) for name, tensor in tensors])
    weights = {name: [weight.format, weight.shape[1]] for name, weight in store.packed.items()}
    record = {**key.to_json(), "weights": weights, "header": _header_hash(header, weights)}
    digest = hashlib.sha256()
    write_header(file, header, _marked(record, digest.hexdigest()))
    for done, (_, tensor) in enumerate(tensors):
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(checksum(data))
        file.write(data.numpy().data)
        on_progress(done + 1, len(tensors))
    # The hash of the content is known now, and as long as the one that held its place.
    file.seek(0)
    write_header(file, header, _marked(record, digest.hexdigest()))


def _marked(record: dict[str, Any], content: str) -> dict[str, str]:
    return {_MARK: json.dumps({**record, "content": content})}


def _tensors(store: WeightStore) -> list[tuple[str, Tensor]]:
    """Every tensor; wide elements first, as in safetensors' own files, so that all are aligned."""
    found = list(store.plain.items())
    for name, weight in store.packed.items():
        found.append((name, weight.data))
        if weight.scale is not None:
            found.append((f"{name}.scale", weight.scale))
    return sorted(found, key=lambda item: -item[1].element_size())


def _header_hash(header: dict[str, Any], weights: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([header, weights]).encode()).hexdigest()
