"""SHA-256 of files' bytes, each read once for each version of the file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .file_index import is_settled, read_rows, write_rows
from .files import not_read
from .progress import OnProgress, throttled
from .scan import Picture

_HASH = (int, int, str)
"""Of a row: size in bytes, mtime in ns, SHA-256."""
_CHUNK_BYTES = 1 << 20
_WORKERS = 2
_FILES_PER_TURN = 64


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """Hashes of many files, and what they took."""

    digests: tuple[str, ...]
    """SHA-256 in hex, in the order of the pictures."""
    num_read: int
    """Files that had to be read."""
    num_bytes: int
    """Of the files that had to be read."""
    seconds: float


class ContentHashes:
    """SHA-256 of files' bytes, read once per absolute path, size and time of change.

    `file` is our own, for all folders. Two processes may use it: each adds to it what it hashed.
    """

    def __init__(self, file: Path | None) -> None:
        """Without a `file` nothing is remembered."""
        self._file = file
        self._rows = read_rows(file, _HASH) if file else {}
        self._fresh: dict[str, tuple] = {}

    @classmethod
    def in_folder(cls, index_folder: Path | None) -> ContentHashes:
        """Those of the folder of our own files, as `scan_folder` takes it."""
        return cls(index_folder / "contents.json" if index_folder else None)

    def of(self, path: str, num_bytes: int, mtime_ns: int) -> str:
        """The hash in hex of the file that had this size and time when it was listed.

        Raises:
            ValueError: the file cannot be read.
        """
        return self._remembered(path, num_bytes, mtime_ns) or self._read(path, num_bytes, mtime_ns)

    def of_all(self, pictures: Sequence[Picture], on_progress: OnProgress | None = None) -> Hashed:
        """The hashes of all pictures, read by two threads and saved, also if it is stopped.

        Raises:
            ValueError: a file cannot be read, or the hashes cannot be written.
        """
        began = time.perf_counter()
        keys = [(picture.path, picture.num_bytes, picture.mtime_ns) for picture in pictures]
        missing = [key for key in keys if not self._remembered(*key)]
        report = throttled(on_progress)
        done = len(keys) - len(missing)
        digests = {}
        turns = [missing[i : i + _FILES_PER_TURN] for i in range(0, len(missing), _FILES_PER_TURN)]
        workers = ThreadPoolExecutor(_WORKERS)
        try:
            for turn, read in zip(turns, workers.map(self._read_turn, turns), strict=True):
                digests |= zip((path for path, *_ in turn), read, strict=True)
                done += len(turn)
                report(done, len(keys))
        finally:
            workers.shutdown(cancel_futures=True)
            self.save()
        return Hashed(
            digests=tuple(digests.get(key[0]) or self._remembered(*key) for key in keys),
            num_read=len(missing),
            num_bytes=sum(num_bytes for _, num_bytes, _ in missing),
            seconds=time.perf_counter() - began,
        )

    def save(self) -> None:
        """Write what was hashed, if anything.

        Raises:
            ValueError: if the disk is full or refuses.
        """
        if self._fresh and self._file:
            # Another process may have written meanwhile. What is lost when both write in the same
            # moment is hashed again.
            self._rows = read_rows(self._file, _HASH) | self._fresh
            write_rows(self._file, self._rows)
            self._fresh = {}

    def _remembered(self, path: str, num_bytes: int, mtime_ns: int) -> str:
        size, time_ns, digest = self._fresh.get(path) or self._rows.get(path) or (0, 0, "")
        return digest if (size, time_ns) == (num_bytes, mtime_ns) else ""

    def _read_turn(self, keys: Iterable[tuple[str, int, int]]) -> list[str]:
        return [self._read(*key) for key in keys]

    def _read(self, path: str, num_bytes: int, mtime_ns: int) -> str:
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                now = os.fstat(file.fileno())
        except OSError as error:
            raise not_read(path, error) from error
        # It may have changed since it was listed: then this is not the hash of the listed content.
        is_same = (now.st_size, now.st_mtime_ns) == (num_bytes, mtime_ns)
        if is_same and is_settled(mtime_ns):
            self._fresh[path] = (num_bytes, mtime_ns, digest.hexdigest())
        return digest.hexdigest()
