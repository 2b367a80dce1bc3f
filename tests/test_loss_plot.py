"""The picture of the loss: its numbers against numpy's, and what is drawn where."""

import math

import numpy as np
import pytest
from atelier.trainers.loss_plot import log_ticks, loss_plot, smoothed, ticks
from PIL import Image

RAW, SMOOTH = (169, 189, 216), (29, 79, 145)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 200, [0, 50, 100, 150, 200]),
        (0.31, 0.77, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        (0, 3, [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        (0.5, 0.5, [0.5, 0.6]),
        (0, 0, [0, 0.2]),
    ],
)
def test_ticks_are_round_numbers_around_the_data(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("high", "expected"), [(1, [0, 1]), (3, [0, 1, 2, 3])])
def test_ticks_of_steps_are_whole_numbers(high: int, expected: list[int]) -> None:
    assert ticks(0, high, whole=True) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.31, 0.55, [0.3, 0.35, 0.4, 0.45, 0.5, 0.55]),
        (0.35, 1.4, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2]),
        (0.03, 1, [0.02, 0.05, 0.1, 0.2, 0.5, 1]),
        (1e-6, 1, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
        (1e-20, 1, [1e-20, 1e-17, 1e-14, 1e-11, 1e-8, 1e-5, 1e-2, 10]),
        (0.5, 0.5, [0.5, 0.6]),
    ],
)
def test_logarithmic_ticks_are_round_numbers_around_the_data(
    low: float, high: float, expected: list[float]
) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_the_smoothed_loss_is_a_weighted_mean_of_what_came_before() -> None:
    values = [3.0, 1.0, 2.0] * 20
    means = smoothed(values, 0.9)
    for end in (1, 2, 7, 60):
        weights = 0.9 ** np.arange(end)[::-1]
        assert means[end - 1] == pytest.approx(np.average(values[:end], weights=weights))


def test_without_smoothing_the_losses_stay() -> None:
    assert smoothed([3.0, 1.0, 2.0], 0) == [3.0, 1.0, 2.0]


def columns_of(picture: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """The columns that have pixels of about this colour, right of the axis and below the words."""
    pixels = np.asarray(picture).astype(int)[45:-50, 90:]
    near = np.abs(pixels - colour).max(axis=2) < 40
    return list(np.flatnonzero(near.any(axis=0)) + 90)


def heights_of(picture: Image.Image, colour: tuple[int, int, int], column: int) -> float:
    pixels = np.asarray(picture).astype(int)[45:-50, column]
    return float(np.flatnonzero(np.abs(pixels - colour).max(axis=1) < 40).mean()) + 45


@pytest.mark.parametrize("steps", [2, 30, 5000])
def test_both_curves_span_the_steps(steps: int) -> None:
    losses = [1 + math.sin(step) for step in range(steps)]
    picture = loss_plot(losses, smoothing=0.9)
    first = 78 + (960 - 78 - 36) / steps
    for colour in (RAW, SMOOTH):
        found = columns_of(picture, colour)
        assert found[0] == pytest.approx(max(90, first), abs=4)
        assert found[-1] == pytest.approx(960 - 36, abs=4)


def test_a_single_loss_is_a_dot() -> None:
    found = columns_of(loss_plot([0.5], smoothing=0.9), SMOOTH)
    assert 5 < len(found) < 15
    assert np.mean(found) == pytest.approx(960 - 36, abs=2)


@pytest.mark.parametrize("log_scale", [False, True])
def test_losses_are_drawn_at_their_heights(log_scale: bool) -> None:
    picture = loss_plot([0.1] * 100 + [1.0] * 100, smoothing=0, log_scale=log_scale)
    low, high = heights_of(picture, SMOOTH, 300), heights_of(picture, SMOOTH, 700)
    share = (1.0 - 0.1) / 1.0 if not log_scale else 1.0  # axes from 0 to 1, and from 0.1 to 1
    assert low - high == pytest.approx(share * (540 - 58 - 58), abs=2)


def test_what_cannot_be_drawn_is_left_out() -> None:
    losses = [1.0, math.nan, 0.5, math.inf, 0.25]
    assert columns_of(loss_plot(losses, smoothing=0), SMOOTH)
    assert columns_of(loss_plot([0.0, 0.1, 0.0, 1.0], smoothing=0, log_scale=True), SMOOTH)


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([], {}, r"^None of the 0 losses is a number, so there is nothing to plot\."),
        ([math.nan], {}, r"^None of the 1 losses is a number, so"),
        ([0.0, 0.0], {"log_scale": True}, r"^None of the 2 losses is a number above 0.*Turn log_"),
        ([1.0], {"smoothing": 1.0}, r"^The smoothing must be at least 0 and below 1, got 1\.0\."),
        ([1.0], {"size": (300, 300)}, r"^A loss plot needs 384x256 pixels or more, got 300x300\."),
    ],
)
def test_what_cannot_be_plotted_is_said(losses: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss_plot(losses, **{"smoothing": 0.9, **options})


@pytest.mark.parametrize("size", [(384, 256), (1920, 1080), (700, 300)])
def test_the_picture_has_the_size_that_was_asked_for(size: tuple[int, int]) -> None:
    assert loss_plot([2.0, 1.0], smoothing=0.5, size=size, title="猫").size == size
