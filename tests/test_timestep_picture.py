"""The picture of Schedule Settings: what is drawn where, measured in its pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from atelier.trainers.flow_settings import (
    LOSS_WEIGHTS,
    TIMESTEP_SAMPLING,
    FlowSettings,
    LossSettings,
    TimestepSettings,
)
from atelier.trainers.timestep_picture import SIZE, describe, timestep_picture

LEFT, RIGHT, TOP, BOTTOM = 68, SIZE[0] - 68, 92, SIZE[1] - 66
"""The place of both axes: sigma 0 and 1, and the lowest and highest value."""
BAR, LINE = (169, 195, 230), (179, 72, 10)


def pixels(settings: TimestepSettings, weight: str = "none", **size: int) -> np.ndarray:
    flow = FlowSettings(timesteps=settings, loss=LossSettings(weight=weight))
    return np.asarray(timestep_picture(flow, **size)).astype(int)


def is_colour(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.abs(picture - colour).max(-1) < 24


def bar_height(picture: np.ndarray, sigma: float) -> float:
    """Pixels from the axis to the top of the bar at sigma; 0 without one."""
    x = round(LEFT + sigma * (RIGHT - LEFT))
    rows = np.flatnonzero(is_colour(picture, BAR)[TOP:BOTTOM, x - 2 : x + 3].all(1))
    return float(BOTTOM - TOP - rows.min()) if len(rows) else 0.0


def line_height(picture: np.ndarray, sigma: float) -> float:
    x = round(LEFT + sigma * (RIGHT - LEFT))
    rows = np.flatnonzero(is_colour(picture, LINE)[TOP - 4 : BOTTOM + 4, x])
    return BOTTOM - (TOP - 4) - float(rows.mean())


def logit_normal(s: float) -> float:
    x = math.log(s / (1 - s))
    return math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) / (s * (1 - s))


DENSITIES = {
    "uniform": ({}, lambda s: 1.0),
    "logit_normal": ({"sampling": "logit_normal"}, logit_normal),
    "beta": ({"sampling": "beta"}, lambda s: 6 * s * (1 - s)),
    "shift": (
        {"sampling": "shift", "shift": 3.0},
        lambda s: logit_normal(s / (3 - 2 * s)) * 3 / (3 - 2 * s) ** 2,
    ),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_bars_are_as_high_as_the_published_density(name: str) -> None:
    settings, density = DENSITIES[name]
    picture = pixels(TimestepSettings(**settings))
    places = [0.11, 0.31, 0.51, 0.71, 0.91]  # the middles of bars
    heights = np.array([bar_height(picture, place) for place in places])
    expected = np.array([density(place) for place in places])
    unit = heights.sum() / expected.sum()
    assert unit > 50
    assert np.abs(heights - unit * expected).max() <= 4


def test_content_is_at_the_side_of_noise_and_style_at_that_of_the_picture() -> None:
    content = pixels(TimestepSettings(sampling="content"))
    style = pixels(TimestepSettings(sampling="style"))
    assert bar_height(content, 0.93) > 2 * bar_height(content, 0.07) > 0
    assert bar_height(style, 0.07) > 2 * bar_height(style, 0.93) > 0


def test_the_values_of_a_list_have_their_shares() -> None:
    picture = pixels(TimestepSettings(sampling="custom", custom=(0.25, 0.25, 0.25, 0.75)))
    assert bar_height(picture, 0.25) == pytest.approx(3 * bar_height(picture, 0.75), abs=4)
    assert bar_height(picture, 0.75) > 30
    assert bar_height(picture, 0.5) == 0


@pytest.mark.parametrize(
    ("weight", "places", "ratio"),
    [
        ("cosmap", (0.5, 0.1), 2 * (1 - 0.2 + 0.02)),
        ("none", (0.2, 0.7), 1.0),
        # exp(-2 (s - 1/2)^2) less its smallest value, at the end
        ("bell", (0.5, 0.25), (1 - math.exp(-0.5)) / (math.exp(-0.125) - math.exp(-0.5))),
    ],
)
def test_the_line_is_the_weight(weight: str, places: tuple[float, float], ratio: float) -> None:
    picture = pixels(TimestepSettings(), weight)
    one, other = (line_height(picture, place) for place in places)
    assert one / other == pytest.approx(ratio, abs=0.03)


def test_a_weight_of_many_sizes_has_a_logarithmic_axis() -> None:
    """1 / sigma^2 from 1 to 10^6: at a tenth of the noise 10^2, a third of the height."""
    picture = pixels(TimestepSettings(), "sigma_sqrt")
    assert line_height(picture, 0.1) / (BOTTOM - TOP) == pytest.approx(1 / 3, abs=0.01)


def test_every_sampling_and_weight_has_a_picture_of_its_own() -> None:
    needed = {"shift": {"shift": 3.1582}, "custom": {"custom": (0.3, 0.6)}}
    pictures = {
        pixels(TimestepSettings(sampling=name, **needed.get(name, {})), weight).tobytes()
        for name, weight in zip(TIMESTEP_SAMPLING, 3 * LOSS_WEIGHTS, strict=True)
    }
    assert len(pictures) == len(TIMESTEP_SAMPLING)


def test_the_automatic_shift_goes_by_the_size_of_the_pictures() -> None:
    settings = TimestepSettings(sampling="flux_shift")
    small, large = (pixels(settings, width=side, height=side) for side in (256, 2048))
    assert bar_height(large, 0.95) > 2 * bar_height(small, 0.95) > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "uniform"),
        ({"shift": 3.0}, "uniform, shift 3"),
        ({"auto_shift": True}, "uniform, shift 1.88 at 512x512"),
        ({"sampling": "logit_normal", "logit_mean": -0.5}, "logit_normal (logit_mean -0.5)"),
        ({"sampling": "beta", "logit_mean": -0.5}, "beta"),
    ],
)
def test_the_title_says_what_is_drawn(settings: dict, expected: str) -> None:
    assert describe(TimestepSettings(**settings), 512, 512) == expected


def test_pictures_without_a_token_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 pixels wide and high, got 8x512"):
        timestep_picture(FlowSettings(), width=8, height=512)
