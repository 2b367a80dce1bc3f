"""Encoding what a cache lacks: the next batch is read while one is encoded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from .checks import require
from .progress import OnProgress
from .shards import Shards

_Read = TypeVar("_Read")


def fill(
    shards: Shards,
    groups: Mapping[str, Hashable],
    batch_size: int,
    read: Callable[[list[str]], _Read],
    encode: Callable[[_Read], Iterable[tuple[str, dict[str, Tensor]]]],
    on_progress: OnProgress | None,
) -> None:
    """Write what `encode` gives, keys with their tensors by name, for the keys that `shards` lack.

    Keys of one group, in batches, are given to `read`, and what it returns to `encode`. It runs in
    another thread: while one batch is encoded, the next is read. A key may be left out. Progress is
    told before the first entry and after each.

    Raises:
        ValueError: the batch size is below 1, and what `read`, `encode` and the disk raise. What
            was encoded before stays.
    """
    require(batch_size >= 1, f"The batch size must be 1 or more, got {batch_size}.")
    report = on_progress or (lambda done, total: None)
    missing = shards.missing(groups)
    done = len(groups) - len(missing)
    report(done, len(groups))
    batches = _batches(missing, groups, batch_size)
    with shards.writing() as write, ThreadPoolExecutor(1) as reader:
        for batch in _read_ahead(reader, read, batches):
            for key, tensors in encode(batch):
                write(key, {name: tensor.cpu() for name, tensor in tensors.items()})
                done += 1
                report(done, len(groups))


def _read_ahead(
    reader: ThreadPoolExecutor, read: Callable[[list[str]], _Read], batches: Iterable[list[str]]
) -> Iterator[_Read]:
    """What `read` gives for each batch; the next one is on its way meanwhile."""
    ahead: Future[_Read] | None = None
    for keys in batches:
        following = reader.submit(read, keys)
        if ahead:
            yield ahead.result()
        ahead = following
    if ahead:
        yield ahead.result()


def _batches(
    keys: Iterable[str], groups: Mapping[str, Hashable], batch_size: int
) -> Iterator[list[str]]:
    members: dict[Hashable, list[str]] = {}
    for key in keys:
        members.setdefault(groups[key], []).append(key)
    for group in members.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
