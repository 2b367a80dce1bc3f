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
    samples = [num_samples(subset) for subset in dataset.subsets]
    batch_size = settings.batch_size
    lines = [_epoch(dataset, sum(num_batches(one, batch_size) for one in samples), settings)]
    for subset, counts in zip(dataset.subsets, samples, strict=True):
        lines += _subset_lines(dataset, subset, counts, batch_size)
    duplicates = duplicate_names(dataset)
    if duplicates:
        lines.append(f"Pictures that are there more than once: {listed(duplicates)}.")
    return [*lines, *dataset.warnings]


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


def num_batches(samples: Counter[Size], batch_size: int) -> int:
    """Batches of one pass over a subset: each holds pictures of one size, and may run short."""
    return sum(math.ceil(count / batch_size) for count in samples.values())


def num_samples(subset: Subset) -> Counter[Size]:
    """How many samples of an epoch have each size."""
    counts: Counter[Size] = Counter()
    for record in subset.records:
        counts[subset.size_of(record)] += record.repeats
    return counts


def _epoch(dataset: Dataset, batches: int, settings: TrainSettings) -> str:
    pictures = sum(len(subset.records) for subset in dataset.subsets)
    steps = batches / settings.gradient_accumulation
    return (
        f"Epoch: samples {dataset.num_samples} of {pictures} pictures; batches of up to "
        f"{settings.batch_size}: {batches}; steps with gradient accumulation "
        f"{settings.gradient_accumulation}: {steps:.6g}."
    )


def _subset_lines(
    dataset: Dataset, subset: Subset, samples: Counter[Size], batch_size: int
) -> Iterator[str]:
    schedule, name = subset.schedule, _label(dataset, subset)
    yield f"Dataset {name}: pictures {len(subset.records)}, samples per epoch {subset.num_samples}."
    total = sum(other.schedule.probability for other in dataset.subsets)
    if total:
        yield f"Dataset {name}: share of the batches {schedule.probability / total:.1%}."
    if schedule.start_step:
        yield f"Dataset {name}: seen from step {schedule.start_step} on."
    if subset.is_regularization:
        yield f"Dataset {name}: regularization, which keeps what the model can draw already."
    if subset.is_prior:
        yield f"Dataset {name}: class pictures, learned as they are with prior_weight."
    num_masked = sum(record.mask is not None for record in subset.records)
    if num_masked:
        yield f"Dataset {name}: pictures with a mask {num_masked}."
    num_referenced = sum(record.reference is not None for record in subset.records)
    if num_referenced:
        yield f"Dataset {name}: pictures with a reference {num_referenced}."
    for (width, height), count in samples.most_common(_SIZES_NAMED):
        size = f"{width}x{height}"
        batches, rest = math.ceil(count / batch_size), count % batch_size
        if rest:
            yield (
                f"Size {size} of {name}: samples {count}, batches {batches}, one of them with only "
                f"{rest}."
            )
        else:
            yield f"Size {size} of {name}: samples {count}, batches {batches}."
    if len(samples) > _SIZES_NAMED:
        rarer = len(samples) - _SIZES_NAMED
        yield f"Dataset {name}: further sizes, with fewer pictures {rarer}."


def _label(dataset: Dataset, subset: Subset) -> str:
    """The name of a subset, and its size where another has the same name."""
    names = [other.name for other in dataset.subsets]
    size = f" at {subset.resolution.width}x{subset.resolution.height}"
    return subset.name + (size if names.count(subset.name) > 1 else "")
