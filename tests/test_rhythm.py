"""When a validation or a checkpoint is due, against fractions, which have no rounding errors."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
from atelier.trainers.config import Length
from atelier.trainers.rhythm import NEVER, Rhythm


def due(rhythm: Rhythm, steps_per_epoch: float = 1.0, last: int = 12) -> list[int]:
    return [step for step in range(last + 1) if rhythm.is_due(step, steps_per_epoch)]


@pytest.mark.parametrize(
    ("rhythm", "steps"),
    [
        (Rhythm(every=5), [0, 5, 10]),
        (Rhythm(every=5, at_start=False), [5, 10]),
        (Rhythm(every=0), [0]),
        (Rhythm(every=0, at_start=False), []),
        (NEVER, []),
    ],
)
def test_steps(rhythm: Rhythm, steps: list[int]) -> None:
    assert due(rhythm, 3.5) == steps


@pytest.mark.parametrize(
    ("every", "steps_per_epoch", "steps"),
    [
        (1, 4.0, [0, 4, 8, 12]),
        (2, 2.5, [0, 5, 10]),
        (1, 2.5, [0, 3, 5, 8, 10]),  # the first step at which the epoch is over
        (1, 0.5, list(range(13))),  # two epochs are over after each
        (3, 0.4, [0, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12]),  # 1.2 steps
    ],
)
def test_epochs(every: int, steps_per_epoch: float, steps: list[int]) -> None:
    assert due(Rhythm(every=every, unit="epochs"), steps_per_epoch) == steps


def test_an_epoch_is_over_at_the_first_step_that_has_seen_all_of_it() -> None:
    """Also where the number of steps of an epoch is no whole number, nor one that floats have."""
    for batches, accumulation, every in product(range(1, 30), range(1, 12), (1, 3)):
        distance = every * Fraction(batches, accumulation)
        exact = {math.ceil(number * distance) for number in range(math.ceil(60 / distance) + 1)}
        found = due(Rhythm(every=every, unit="epochs"), batches / accumulation, last=60)
        assert found == sorted(step for step in exact if step <= 60)


def test_a_length_in_epochs_is_exact_too() -> None:
    for batches, accumulation, epochs in product(range(1, 30), range(1, 12), range(1, 60)):
        exact = math.ceil(epochs * Fraction(batches, accumulation))
        length = Length(amount=epochs, unit="epochs")
        assert length.num_steps(batches / accumulation) == exact


def test_a_negative_distance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^The distance must be 0 \(never\) or more, got -1\.$"):
        Rhythm(every=-1)
