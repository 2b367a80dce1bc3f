"""A dataset in plain words: what an epoch of it is, and what is probably not meant.

Nothing is decoded: the words come from the description alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from .buckets import Size
from .captions import listed
from .config import TrainSettings
from .dataset import Dataset, Subset

_SIZES_NAMED = 20
"""Of a subset with more, the sizes with the most pictures are named."""


def report(dataset: Dataset, settings: TrainSettings) -> list[str]:
    """Sentences, one a line. Of the settings, batch size and gradient accumulation count."""
    lines = [_epoch(dataset, settings)]
    for subset in dataset.subsets:
        lines += _subset_lines(dataset, subset, settings.batch_size)
    duplicates = duplicate_names(dataset)
    if duplicates:
        lines.append(f"Pictures that are there more than once: {listed(duplicates)}.")
    return [*lines, *dataset.warnings]


def num_batches(subset: Subset, batch_size: int) -> int:
    """Batches of one pass over a subset: each holds pictures of one size, and may run short."""
    samples = _samples(subset).values()
    return sum(math.ceil(count / batch_size) for count in samples)


def duplicate_names(dataset: Dataset) -> list[str]:
    """Of each picture whose bytes are there more than once, the names of its files.

    A file that several subsets train, as at several sizes, is one picture.
    """
    places: dict[str, Counter[str]] = {}
    for subset in dataset.subsets:
        counts = Counter((record.content, record.path) for record in subset.records)
        for (content, path), count in counts.items():
            known = places.setdefault(content, Counter())
            known[path] = max(known[path], count)
    return [
        " = ".join(Path(path).name for path in counts.elements())
        for counts in places.values()
        if counts.total() > 1
    ]


def _epoch(dataset: Dataset, settings: TrainSettings) -> str:
    batches = sum(num_batches(subset, settings.batch_size) for subset in dataset.subsets)
    pictures = sum(len(subset.records) for subset in dataset.subsets)
    steps = batches / settings.gradient_accumulation
    return (
        f"An epoch: {dataset.num_samples} samples of {pictures} pictures, in {batches} batches of "
        f"up to {settings.batch_size}, which are {steps:.4g} steps with gradient accumulation "
        f"{settings.gradient_accumulation}."
    )


def _subset_lines(dataset: Dataset, subset: Subset, batch_size: int) -> Iterator[str]:
    schedule, name = subset.schedule, subset.name
    yield f"{name}: {len(subset.records)} pictures, {subset.num_samples} samples per epoch."
    total = sum(other.schedule.probability for other in dataset.subsets)
    if total:
        yield f"{name}: {schedule.probability / total:.1%} of the batches come from it."
    if schedule.start_step:
        yield f"{name}: its pictures are seen from step {schedule.start_step} on."
    if subset.is_regularization:
        yield f"{name}: regularization, which keeps what the model can draw already."
    num_masked = sum(record.mask is not None for record in subset.records)
    if num_masked:
        yield f"{name}: {num_masked} of {len(subset.records)} pictures have a mask."
    samples = _samples(subset)
    for (width, height), count in samples.most_common(_SIZES_NAMED):
        yield _size_line(name, f"{width}x{height}", count, batch_size)
    if len(samples) > _SIZES_NAMED:
        yield f"{name}: {len(samples) - _SIZES_NAMED} more sizes with fewer pictures."


def _size_line(name: str, size: str, count: int, batch_size: int) -> str:
    batches, rest = math.ceil(count / batch_size), count % batch_size
    if rest:
        return f"{name}, {size}: {count} samples, {batches} batches, one of them of only {rest}."
    return f"{name}, {size}: {count} samples, {batches} batches."


def _samples(subset: Subset) -> Counter[Size]:
    counts: Counter[Size] = Counter()
    for record in subset.records:
        counts[subset.size_of(record)] += record.repeats
    return counts
