"""What the order of the pictures depends on; `test_schedule.py` has what an epoch holds."""

from __future__ import annotations

import itertools
import random

import pytest
from atelier.trainers.batches import BatchOrder
from atelier.trainers.caches import LatentEntry, LatentSubset

SIZES = [(512, 512)] * 5 + [(768, 512)] * 3 + [(512, 768)]
REPEATS = [1, 2, 1, 3, 1, 1, 2, 1, 4]


def make_entries() -> list[LatentEntry]:
    return [
        LatentEntry(
            record=f"record {index}",
            keys=(f"key {index}",),
            texts=(("",),),
            width=width,
            height=height,
            repeats=repeats,
        )
        for index, ((width, height), repeats) in enumerate(zip(SIZES, REPEATS, strict=True))
    ]


def make_order(entries: list[LatentEntry], *, batch_size: int = 2, seed: int = 0) -> BatchOrder:
    subset = LatentSubset(name="pictures", entries=tuple(entries))
    return BatchOrder([subset], batch_size=batch_size, seed=seed)


def keys(order: BatchOrder, steps: range) -> list[list[str]]:
    return [[entry.name for entry in order.batch(step)] for step in steps]


def epoch(order: BatchOrder, number: int) -> list[list[str]]:
    count = order.batches_per_epoch
    return keys(order, range(number * count, (number + 1) * count))


def test_the_order_of_the_entries_does_not_matter() -> None:
    one, entries = make_order(make_entries(), batch_size=2, seed=4), make_entries()
    random.Random(1).shuffle(entries)
    assert epoch(make_order(entries, batch_size=2, seed=4), 0) == epoch(one, 0)


def test_another_seed_is_another_order() -> None:
    one, other = (make_order(make_entries(), batch_size=2, seed=seed) for seed in (0, 1))
    assert epoch(one, 0) != epoch(other, 0)


def test_epochs_differ() -> None:
    order = make_order(make_entries(), batch_size=2, seed=0)
    assert epoch(order, 0) != epoch(order, 1)


def test_pictures_meet_others_in_another_epoch() -> None:
    """Batches are made anew, not only called in another order."""
    order = make_order(make_entries(), batch_size=2, seed=0)
    pairs = [{tuple(sorted(batch)) for batch in epoch(order, number)} for number in (0, 1)]
    assert pairs[0] != pairs[1]


def test_sizes_are_shuffled_among_each_other() -> None:
    order = make_order(make_entries(), batch_size=1, seed=0)
    widths = [order.batch(step)[0].width for step in range(order.batches_per_epoch)]
    changes = sum(a != b for a, b in itertools.pairwise(widths))
    assert changes > len(set(SIZES))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_the_largest_batch_has_the_most_pixels(batch_size: int) -> None:
    """A size with few pictures never fills a large batch."""
    order = make_order(make_entries(), batch_size=batch_size, seed=0)
    batches = [order.batch(step) for step in range(order.batches_per_epoch)]
    pixels = [sum(entry.width * entry.height for entry in batch) for batch in batches]
    largest, count = order.largest_batch(prompt_length=0)
    assert largest.width * largest.height * count == max(pixels)
    assert any(len(batch) == count and batch[0].sizes == largest.sizes for batch in batches)


@pytest.mark.parametrize(("prompt_length", "expected"), [(0, (560, 512, 1)), (512, (256, 256, 4))])
def test_the_largest_batch_counts_the_tokens_of_the_prompts(
    prompt_length: int, expected: tuple[int, int, int]
) -> None:
    """4 x (256 + 512) tokens are more than 1120 + 512, and 4 x 256 are less than 1120."""
    entries = [
        LatentEntry(record=key, keys=(key,), texts=(("",),), width=width, height=height)
        for key, width, height in [*((k, 256, 256) for k in "abcd"), ("e", 560, 512)]
    ]
    order = make_order(entries, batch_size=4, seed=0)
    largest, count = order.largest_batch(prompt_length)
    assert (largest.width, largest.height, count) == expected
