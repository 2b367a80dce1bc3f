"""Which pictures an epoch has, for any dataset that hypothesis makes up."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from atelier.trainers.batches import BatchOrder
from atelier.trainers.caches import LatentCache, LatentEntry, LatentSubset
from atelier.trainers.config import Schedule
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

SIDES = (256, 512, 768)
Pictures = list[tuple[int, int, int]]
"""Width, height and repeats of each."""

pictures = st.lists(
    st.tuples(st.sampled_from(SIDES), st.sampled_from(SIDES), st.integers(1, 5)),
    min_size=1,
    max_size=30,
)
datasets = st.lists(pictures, min_size=1, max_size=4)


def make_subset(name: str, pictures: Pictures, schedule: Schedule | None = None) -> LatentSubset:
    entries = tuple(
        LatentEntry(
            record=f"{name}{index}",
            keys=(f"{name}{index}",),
            texts=(("",),),
            width=width,
            height=height,
            repeats=repeats,
        )
        for index, (width, height, repeats) in enumerate(pictures)
    )
    return LatentSubset(name=name, entries=entries, schedule=schedule or Schedule())


def make_subsets(dataset: list[Pictures], schedules: list[Schedule]) -> list[LatentSubset]:
    made = zip("abcd", dataset, schedules, strict=False)
    return [make_subset(name, pictures, schedule) for name, pictures, schedule in made]


def seen(order: BatchOrder, micro_steps: range) -> list[list[LatentEntry]]:
    return [order.batch(micro_step) for micro_step in micro_steps]


def epoch_of(order: BatchOrder, number: int, start: int = 0) -> list[list[LatentEntry]]:
    count = order.batches_per_epoch
    return seen(order, range(start + number * count, start + (number + 1) * count))


@given(datasets, st.integers(1, 7), st.integers(0, 2**31), st.integers(0, 50))
def test_every_epoch_has_every_picture_its_repeats(
    dataset: list[Pictures], batch_size: int, seed: int, number: int
) -> None:
    subsets = make_subsets(dataset, [Schedule()] * 4)
    order = BatchOrder(subsets, batch_size=batch_size, seed=seed)
    batches = epoch_of(order, number)
    entries = [entry for subset in subsets for entry in subset.entries]
    assert Counter(entry.name for batch in batches for entry in batch) == {
        entry.name: entry.repeats for entry in entries
    }


@given(datasets, st.integers(1, 7), st.integers(0, 2**31))
def test_a_batch_is_of_one_size_and_one_subset_and_only_the_last_of_them_is_short(
    dataset: list[Pictures], batch_size: int, seed: int
) -> None:
    order = BatchOrder(make_subsets(dataset, [Schedule()] * 4), batch_size=batch_size, seed=seed)
    short: Counter[tuple] = Counter()
    for batch in epoch_of(order, 0):
        kinds = {(entry.name[0], entry.width, entry.height) for entry in batch}
        assert len(kinds) == 1
        assert len(batch) <= batch_size
        short[kinds.pop()] += len(batch) < batch_size
    assert set(short.values()) <= {0, 1}


@given(datasets, st.integers(1, 7), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_the_order_is_the_seeds_and_no_matter_what_was_asked_before(
    dataset: list[Pictures], batch_size: int, seed: int, random
) -> None:
    subsets = make_subsets(dataset, [Schedule()] * 4)
    first, again = (BatchOrder(subsets, batch_size=batch_size, seed=seed) for _ in range(2))
    steps = list(range(3 * first.batches_per_epoch))
    expected = {step: first.batch(step) for step in steps}
    random.shuffle(steps)
    assert {step: again.batch(step) for step in steps} == expected


@given(
    datasets,
    st.lists(st.integers(1, 60), min_size=3, max_size=3),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_a_subset_is_seen_from_its_start_step_on_and_then_in_every_epoch(
    dataset: list[Pictures], starts: list[int], accumulation: int, batch_size: int
) -> None:
    schedules = [Schedule(), *(Schedule(start_step=start) for start in starts)]
    subsets = make_subsets(dataset, schedules)
    order = BatchOrder(subsets, batch_size=batch_size, seed=0, gradient_accumulation=accumulation)
    begins = {s.name: s.schedule.start_step * accumulation for s in subsets}
    last = max(begins.values())
    for micro_step, batch in enumerate(seen(order, range(last))):
        assert begins[batch[0].name[0]] <= micro_step
    after = Counter(e.name for batch in epoch_of(order, 0, last) for e in batch)
    assert after == {e.name: e.repeats for subset in subsets for e in subset.entries}


def test_between_two_start_steps_epochs_are_whole() -> None:
    """Of the subset that is there: 4 batches an epoch, 10 micro-steps, then a new epoch."""
    first, second = [(512, 512, 1)] * 4, [(512, 512, 1)] * 3
    schedules = [Schedule(), Schedule(start_step=5)]
    order = BatchOrder(
        make_subsets([first, second], schedules), batch_size=1, seed=0, gradient_accumulation=2
    )
    names = [batch[0].name for batch in seen(order, range(10 + 7))]
    for epoch in (names[:4], names[4:8]):
        assert sorted(epoch) == ["a0", "a1", "a2", "a3"]
    assert len({*names[8:10]}) == 2
    assert sorted(names[10:]) == ["a0", "a1", "a2", "a3", "b0", "b1", "b2"]


@given(
    datasets,
    st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.integers(0, 20),
)
def test_with_probabilities_an_epoch_has_each_subsets_share(
    dataset: list[Pictures],
    probabilities: list[float],
    batch_size: int,
    seed: int,
    number: int,
) -> None:
    schedules = [Schedule(probability=p) for p in probabilities]
    subsets = make_subsets(dataset, schedules)
    order = BatchOrder(subsets, batch_size=batch_size, seed=seed)
    counts = Counter(batch[0].name[0] for batch in epoch_of(order, number))
    total = sum(subset.schedule.probability for subset in subsets)
    assert counts.total() == order.batches_per_epoch
    for subset in subsets:
        share = subset.schedule.probability / total * order.batches_per_epoch
        assert abs(counts[subset.name] - share) < 1 + 1e-9


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 2**31))
def test_a_share_is_drawn_without_repetition_until_all_were_seen(
    few: int, many: int, seed: int
) -> None:
    """Of a subset that gives n batches, no picture is seen two times more than another."""
    halves = [Schedule(probability=1)] * 2
    dataset = [[(512, 512, 1)] * few, [(512, 512, 1)] * many]
    order = BatchOrder(make_subsets(dataset, halves), batch_size=1, seed=seed)
    counts = Counter(batch[0].name for batch in epoch_of(order, 0))
    for name, size in (("a", few), ("b", many)):
        times = [counts[f"{name}{index}"] for index in range(size)]
        assert max(times) - min(times) <= 1


def test_shares_smaller_than_a_batch_come_over_many_epochs() -> None:
    """A tenth of a batch an epoch: rounding must not lose it."""
    schedules = [Schedule(probability=99), Schedule(probability=1)]
    subsets = make_subsets([[(512, 512, 1)] * 9, [(512, 512, 1)]], schedules)
    order = BatchOrder(subsets, batch_size=1, seed=0)
    batches = seen(order, range(20_000))
    counts = Counter(batch[0].name[0] for batch in batches)
    assert counts["b"] == pytest.approx(200, abs=45)  # three standard deviations
    pictures = Counter(batch[0].name for batch in batches if batch[0].name[0] == "a")
    assert chisquare([*pictures.values()]).pvalue > 0.001


def test_epochs_of_one_schedule_differ() -> None:
    order = BatchOrder(
        make_subsets([[(512, 512, 1)] * 8, [(512, 512, 1)] * 8], [Schedule(probability=1)] * 2),
        batch_size=1,
        seed=0,
    )
    epochs = [[b[0].name for b in epoch_of(order, number)] for number in range(4)]
    assert all(one != other for one, other in itertools.combinations(epochs, 2))


def test_probabilities_are_for_all_or_for_none() -> None:
    subsets = make_subsets([[(512, 512, 1)]] * 2, [Schedule(probability=0.5), Schedule()])
    with pytest.raises(ValueError, match=r"^The dataset 'b' has no probability and others have"):
        LatentCache(folder="", encoder="", subsets=tuple(subsets))


def test_something_starts_at_the_first_step() -> None:
    subset = make_subset("a", [(512, 512, 1)], Schedule(start_step=10))
    with pytest.raises(ValueError, match=r"^No dataset starts at step 0"):
        LatentCache(folder="", encoder="", subsets=(subset,))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"probability": -0.5}, r"probability .* 0 \(off\) or more, got -0\.5"),
        ({"probability": float("inf")}, "got inf"),
        ({"probability": float("nan")}, "got nan"),
        ({"start_step": -1}, "start step .* 0 or more, got -1"),
    ],
)
def test_a_schedule_is_checked_when_it_is_made(values: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**values)
