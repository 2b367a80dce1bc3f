"""Flow matching against diffusers' training utilities, its scheduler, and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from atelier.trainers.flow import add_noise, flow_loss, sample_sigmas, seeded
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

FLUX_SCHEDULERS = {
    "dev": {"shift": 3.0, "use_dynamic_shifting": True},
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False},
}
"""scheduler_config.json of the two repositories."""


def draw(*purpose: int | str, seed: int = 0) -> torch.Tensor:
    return torch.randn(8, generator=seeded(seed, *purpose))


def test_the_same_seed_and_purpose_draw_the_same_numbers() -> None:
    assert torch.equal(draw("noise", 3, seed=5), draw("noise", 3, seed=5))


@pytest.mark.parametrize(
    "other",
    [
        draw("noise", 4, seed=5),
        draw("order", 3, seed=5),
        draw("noise", 3, seed=6),
        draw("noise", seed=5),
        draw("noise", 33, seed=5),
        draw(3, "noise", seed=5),
    ],
)
def test_another_seed_or_purpose_draws_other_numbers(other: torch.Tensor) -> None:
    assert not torch.equal(draw("noise", 3, seed=5), other)


def test_a_seed_and_a_purpose_do_not_run_together() -> None:
    assert not torch.equal(draw(23, seed=1), draw(3, seed=12))


def test_generators_do_not_touch_torchs_own() -> None:
    torch.manual_seed(1)
    expected = torch.randn(4)
    torch.manual_seed(1)
    draw("noise")
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize("network", FLUX_SCHEDULERS)
def test_sigmas_are_those_of_diffusers_weighting_none(network: str) -> None:
    """As train_dreambooth_lora_flux.py: density, index into the timesteps, sigma from the table."""
    scheduler = FlowMatchEulerDiscreteScheduler(**FLUX_SCHEDULERS[network])
    generator = torch.Generator().manual_seed(7)
    density = compute_density_for_timestep_sampling("none", 5000, generator=generator)
    indices = (density * scheduler.config.num_train_timesteps).long()
    found = sample_sigmas(5000, torch.Generator().manual_seed(7))
    torch.testing.assert_close(found, scheduler.sigmas[indices], rtol=0, atol=1e-6)
    torch.testing.assert_close(found, scheduler.timesteps[indices] / 1000, rtol=0, atol=1e-6)


def test_sigmas_reach_from_pure_noise_to_a_thousandth() -> None:
    sigmas = sample_sigmas(50_000, torch.Generator().manual_seed(0))
    assert sigmas.max() == 1.0
    assert sigmas.min() == pytest.approx(0.001, abs=1e-7)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    latents, noise, prediction = generator.standard_normal((3, 2, 4, 6, 2))
    return latents, noise, prediction


def test_noised_latents_lie_on_the_straight_path() -> None:
    latents, noise, _ = arrays()
    sigma = np.array([0.25, 0.9])
    expected = [(1 - s) * x + s * n for s, x, n in zip(sigma, latents, noise, strict=True)]
    found = add_noise(*map(torch.from_numpy, (latents, noise, sigma)))
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-12)


def test_the_loss_of_each_picture_is_its_mean_squared_error_to_the_velocity() -> None:
    latents, noise, prediction = arrays()
    expected = [
        np.mean((p - (n - x)) ** 2) for p, n, x in zip(prediction, noise, latents, strict=True)
    ]
    found = flow_loss(*map(torch.from_numpy, (prediction, latents, noise)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    latents, noise, prediction = (torch.from_numpy(a).to(dtype) for a in arrays())
    expected = (prediction.double() - (noise.double() - latents.double())).square()
    found = flow_loss(prediction, latents, noise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.flatten(1).mean(1), rtol=1e-6, atol=0)
