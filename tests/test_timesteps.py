"""Distributions of sigma against their published cumulative functions and diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from atelier.trainers.flow import sample_sigmas, seeded
from atelier.trainers.flow_settings import TIMESTEP_SAMPLING, TimestepSettings
from atelier.trainers.timesteps import SIGMA_MIN, draw_sigmas, flux_shift
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

DRAWS = 40_000
NEAR = 1.63 / math.sqrt(DRAWS)
"""The Kolmogorov-Smirnov distance that 1 % of true samples of this size exceed."""


def draws(settings: TimestepSettings, num_tokens: int = 1024) -> np.ndarray:
    found = draw_sigmas(settings, DRAWS, num_tokens=num_tokens, generator=seeded(1, "sigmas"))
    assert SIGMA_MIN <= float(found.min()) <= float(found.max()) <= 1
    return np.sort(found.double().numpy())


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x])


def logit(s: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):  # sigmas of 1
        return np.log(s) - np.log1p(-s)


def unshifted(s: np.ndarray, by: float) -> np.ndarray:
    return s / (by - (by - 1) * s)


def mode_cdf(s: np.ndarray, scale: float = 1.29) -> np.ndarray:
    """By a table of SD3's formula, which falls from 1 to 0 over u."""
    u = np.linspace(0, 1, 20_001)
    values = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return 1 - np.interp(s, values[::-1], u[::-1])


# 512x512 has 1024 tokens: mu = 0.63.
AT_512 = math.exp(0.63)
CDFS: dict[str, tuple[dict, Callable[[np.ndarray], np.ndarray]]] = {
    "uniform": ({}, lambda s: s),
    "uniform shifted": ({"shift": 3.0}, lambda s: unshifted(s, 3.0)),
    "uniform by size": ({"auto_shift": True}, lambda s: unshifted(s, AT_512)),
    "logit_normal": (
        {"sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 1.5},
        lambda s: normal_cdf((logit(s) - 0.5) / 1.5),
    ),
    "sigmoid": (
        {"sampling": "sigmoid", "sigmoid_scale": 2.0},
        lambda s: normal_cdf(logit(s) / 2),
    ),
    "shift": (
        {"sampling": "shift", "shift": 3.1582},
        lambda s: normal_cdf(logit(unshifted(s, 3.1582))),
    ),
    "flux_shift": (
        {"sampling": "flux_shift"},
        lambda s: normal_cdf(logit(unshifted(s, AT_512))),
    ),
    "mode": ({"sampling": "mode"}, mode_cdf),
    "beta": ({"sampling": "beta"}, lambda s: 3 * s**2 - 2 * s**3),
    "beta, uneven": (
        {"sampling": "beta", "beta_alpha": 3.0, "beta_beta": 1.0},
        lambda s: s**3,
    ),
    "content": ({"sampling": "content"}, lambda s: 1 - np.cbrt(1 - s)),
    "style": ({"sampling": "style"}, np.cbrt),
}


@pytest.mark.parametrize("name", CDFS)
def test_draws_follow_the_published_distribution(name: str) -> None:
    settings, cdf = CDFS[name]
    found = draws(TimestepSettings(**settings))
    inside = found[(found > SIGMA_MIN) & (found < 1)]  # the ends hold what was cut to them
    places = np.searchsorted(found, inside, side="right") / DRAWS
    # The table of timesteps has steps of 0.001.
    assert np.abs(places - cdf(inside)).max() < NEAR + 0.002


def test_the_default_is_the_draw_that_runs_had_before() -> None:
    found = draw_sigmas(TimestepSettings(), 9, num_tokens=64, generator=seeded(3))
    assert torch.equal(found, sample_sigmas(9, seeded(3)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sampling": "custom", "custom": (0.2, 0.6, 0.6)}, {0.2: 1 / 3, 0.6: 2 / 3}),
        ({"sampling": "custom", "custom": (250, 1000)}, {0.25: 0.5, 1.0: 0.5}),
        ({"sampling": "fast"}, {1.0: 0.7, 0.75: 0.1, 0.5: 0.1, 0.25: 0.1}),
    ],
)
def test_lists_are_drawn_evenly(settings: dict, expected: dict[float, float]) -> None:
    values, counts = np.unique(draws(TimestepSettings(**settings)), return_counts=True)
    assert values == pytest.approx(sorted(expected), abs=1e-6)
    assert counts / DRAWS == pytest.approx([expected[s] for s in sorted(expected)], abs=0.01)


@pytest.mark.parametrize("num_tokens", [256, 1024, 1536, 4096])
def test_the_automatic_shift_is_that_of_diffusers(num_tokens: int) -> None:
    assert flux_shift(num_tokens) == pytest.approx(math.exp(calculate_shift(num_tokens)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "gauss"}, "Unknown timestep sampling 'gauss'"),
        ({"shift": -1.0}, r"between 0 \(off\) and 100, got -1.0"),
        ({"shift": 3.0, "auto_shift": True}, "two timestep shifts: 3.0"),
        ({"sampling": "shift"}, "needs a shift above 0"),
        ({"sampling": "flux_shift", "shift": 2.0}, "by the size of the pictures"),
        ({"logit_mean": math.nan}, "logit_mean of the timesteps must be .* -10 and 10, got nan"),
        ({"logit_std": 0.0}, "logit_std of the timesteps must be above 0 and at most 100, got 0.0"),
        ({"mode_scale": 2.0}, "between -1 and 1.75, got 2.0"),
        ({"sampling": "custom"}, "needs a list"),
        ({"sampling": "custom", "custom": (0.5, 2000.0)}, r"got \[2000.0\]"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimestepSettings(**settings)


def test_every_name_draws() -> None:
    needed = {"shift": {"shift": 3.0}, "custom": {"custom": (0.5,)}}
    for name in TIMESTEP_SAMPLING:
        settings = TimestepSettings(sampling=name, **needed.get(name, {}))
        assert draw_sigmas(settings, 4, num_tokens=64, generator=seeded(0)).shape == (4,)
