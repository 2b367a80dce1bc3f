"""Losses and weights against diffusers, numpy and each other's limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from atelier.trainers.flow import flow_loss
from atelier.trainers.flow_settings import LossSettings
from atelier.trainers.losses import huber_c, loss_weight, pointwise_loss, training_loss
from diffusers.training_utils import compute_loss_weighting_for_sd3

SIGMAS = torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0])


def error() -> torch.Tensor:
    return torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["none", "sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(kind: str) -> None:
    expected = compute_loss_weighting_for_sd3(kind, SIGMAS)
    torch.testing.assert_close(loss_weight(kind, SIGMAS), expected)


def test_the_bell_has_a_mean_of_1_and_is_0_at_its_end() -> None:
    """As DiffSynth computes it over its table of timesteps."""
    x = np.arange(1, 1001)
    y = np.exp(-2 * ((x - 500) / 1000) ** 2)
    y -= y.min()
    expected = y / y.mean()
    found = loss_weight("bell", torch.tensor(x / 1000, dtype=torch.float64)).numpy()
    assert np.allclose(found, expected, atol=1e-6)


def test_mse_is_the_loss_that_runs_had_before() -> None:
    prediction, noise = error(), torch.flip(error(), (0,))
    found = training_loss(LossSettings(), prediction, noise, SIGMAS)
    assert torch.equal(found, flow_loss(prediction, torch.zeros_like(noise), noise))


def test_a_mask_and_a_weight_multiply_the_loss() -> None:
    mask = torch.zeros(5, 1, 3, 3)
    mask[..., :2] = 0.5
    settings = LossSettings(weight="sigma_sqrt")
    found = training_loss(settings, error(), torch.zeros_like(error()), SIGMAS, mask)
    squares = error().double().square()[..., :2].sum((1, 2, 3)) / (2 * 4 * 3 * 3)
    torch.testing.assert_close(found, (squares / SIGMAS.double() ** 2).float())


@pytest.mark.parametrize(("loss", "factor"), [("huber", 0.2), ("smooth_l1", 2.0)])
def test_huber_and_smooth_l1_are_the_published_formulas(loss: str, factor: float) -> None:
    found = pointwise_loss(LossSettings(loss=loss, huber_c=0.1), error(), SIGMAS)
    e = error().double().numpy()
    assert np.allclose(found.numpy(), factor * (np.sqrt(e**2 + 0.01) - 0.1), atol=1e-6)


def test_a_small_error_is_squared_and_a_large_one_is_not() -> None:
    huber = LossSettings(loss="huber", huber_c=0.1)
    small, large = torch.tensor([[1e-3]]), torch.tensor([[100.0]])
    one = SIGMAS[:1]
    assert pointwise_loss(huber, small, one).item() == pytest.approx(1e-6, rel=1e-3)
    assert pointwise_loss(huber, large, one).item() == pytest.approx(2 * 0.1 * 100, rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1] * 5),
        # sd-scripts: exp(-alpha * t) with alpha = -ln(c) / 1000 for the timestep t = 1000 sigma
        ("exponential", [np.exp(-(-np.log(0.1) / 1000) * 1000 * s) for s in SIGMAS.tolist()]),
        # sd-scripts: (1 - c) / (1 + noise-to-signal)^2 + c
        (
            "snr",
            [0.9 / (1 + s / max(1 - s, 1e-9)) ** 2 + 0.1 for s in SIGMAS.double().tolist()],
        ),
    ],
)
def test_the_bend_moves_with_the_noise(schedule: str, expected: list[float]) -> None:
    settings = LossSettings(loss="huber", huber_schedule=schedule)
    assert huber_c(settings, SIGMAS).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "l3"}, "Unknown loss 'l3'. Choose one of: mse, huber, smooth_l1"),
        ({"weight": "heavy"}, "Unknown loss weight 'heavy'"),
        ({"huber_schedule": "linear"}, "Unknown Huber schedule 'linear'"),
        ({"huber_c": 0.0}, "huber_c must be in 0 to 1, got 0.0"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**settings)
