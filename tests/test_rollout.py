"""Rollouts: diffusers' Euler sampler between two timesteps, and how often and how far they go."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from atelier.trainers.flow import add_noise, seeded
from atelier.trainers.flow_settings import FlowSettings, RolloutSettings
from atelier.trainers.load import load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.rollout import draw_offsets, probability, roll_out
from dense import dense_transformer, stored_tensors
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_files import write_flux
from runs import job
from torch import Tensor
from training import training_data

SIGMA = torch.tensor([0.3, 0.95, 1.0, 0.0005])
OFFSETS = torch.tensor([3, 7, 0, 1])
DRAWS = 20_000
SEED = 5
"""Of a training whose first sample has a rollout of several steps."""


def pictures(seed: int) -> Tensor:
    return torch.randn(4, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


def curved(noisy: Tensor, sigma: Tensor) -> Tensor:
    """A velocity that is not that of the straight path."""
    return torch.tanh(3 * noisy) + sigma.view(-1, 1, 1, 1)


def by_diffusers(noisy: Tensor, start: float, count: int, velocity) -> Tensor:
    """`noisy` [1, ...] after `count` steps of one timestep of diffusers' sampler."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[start - number / 1000 for number in range(count + 1)])
    for number in range(count):
        at = scheduler.sigmas[number].view(1)
        predicted = velocity(noisy, at)
        noisy = scheduler.step(predicted, scheduler.timesteps[number], noisy, return_dict=False)[0]
    return noisy


def test_the_steps_are_those_of_diffusers_sampler() -> None:
    latents, noise = pictures(0), pictures(1)
    found = roll_out(latents, noise, SIGMA, OFFSETS, curved)
    for index, (sigma, count) in enumerate(zip(SIGMA.tolist(), OFFSETS.tolist(), strict=True)):
        start = sigma + count / 1000
        begun = (1 - start) * latents[index] + start * noise[index]
        expected = by_diffusers(begun[None], start, count, curved)[0]
        torch.testing.assert_close(found[index], expected, rtol=1e-5, atol=1e-6)


def test_a_perfect_network_stays_on_the_straight_path() -> None:
    latents, noise = pictures(0), pictures(1)
    found = roll_out(latents, noise, SIGMA, OFFSETS, lambda *_: noise - latents)
    torch.testing.assert_close(found, add_noise(latents, noise, SIGMA), rtol=0, atol=1e-5)


def test_the_network_is_asked_as_often_as_the_longest_rollout_and_without_gradient() -> None:
    asked = []

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        asked.append((sigma.tolist(), torch.is_grad_enabled()))
        return noisy

    roll_out(pictures(0)[:2], pictures(1)[:2], SIGMA[:2], torch.tensor([1, 2]), velocity)
    assert [with_gradient for _, with_gradient in asked] == [False, False]
    assert asked[0][0] == pytest.approx([0.301, 0.952])
    assert asked[1][0] == pytest.approx([0.301, 0.951])


def drawn(step: int = 0, sigma: float = 0.5, **settings) -> Counter[int]:
    offsets = draw_offsets(
        RolloutSettings(max_offset=4, **settings),
        torch.full((DRAWS,), sigma),
        step=step,
        generator=seeded(0, "test"),
    )
    return Counter(offsets.tolist())


@pytest.mark.parametrize(
    ("offsets", "shares"),
    [
        ("uniform", [1 / 5] * 5),
        # round(4 u^2) is n where u is between the roots of (n - 1/2) / 4 and (n + 1/2) / 4
        ("early", [0.3536, 0.2588, 0.1782, 0.1448, 0.0646]),
        ("late", [0.0646, 0.1448, 0.1782, 0.2588, 0.3536]),
    ],
)
def test_all_early_or_late_offsets_are_drawn(offsets: str, shares: list[float]) -> None:
    counts = drawn(offsets=offsets, probability=1.0)
    found = [counts[number] / DRAWS for number in range(5)]
    assert found == pytest.approx(shares, abs=0.012)


def test_the_others_have_none() -> None:
    assert drawn(probability=0.25)[0] / DRAWS == pytest.approx(0.75 + 0.25 / 5, abs=0.012)


def test_none_begins_before_pure_noise() -> None:
    assert set(drawn(sigma=0.998, probability=1.0)) == {0, 1, 2}
    assert set(drawn(sigma=1.0, probability=1.0)) == {0}
    assert set(drawn(sigma=0.9985, probability=1.0)) == {0, 1}


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({}, [0.5, 0.5, 0.5]),
        ({"ramp_steps": 100}, [0.0, 0.25, 0.5]),
        ({"ramp_steps": 200, "start_probability": 0.9, "probability": 0.1}, [0.9, 0.7, 0.5]),
        ({"ramp_steps": 150, "ramp": "cosine", "probability": 1.0}, [0.0, 0.25, 0.75]),
    ],
)
def test_the_probability_goes_from_one_to_the_other(settings: dict, shares: list[float]) -> None:
    found = [probability(RolloutSettings(**settings), step) for step in (0, 50, 100)]
    assert found == pytest.approx(shares)
    assert probability(RolloutSettings(**settings), 10_000) == pytest.approx(
        settings.get("probability", 0.5)
    )


def test_a_step_trains_where_the_networks_own_steps_led(tmp_path: Path) -> None:
    """The first loss, of a LoRA that does nothing yet, with the velocity of the straight path."""
    rollout = RolloutSettings(max_offset=6, probability=1.0)
    settings = job(1, flow=FlowSettings(rollout=rollout), seed=SEED)
    base = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    data = training_data(tmp_path / "caches", ((64, 64),))
    found = train(open_run(tmp_path, settings, base, data), base, data, settings).losses

    picture = data.latents.load(data.latents.entries[0].name)
    text = data.prompts.load("caption 0")
    generator = seeded(SEED, "micro-step", 0)
    latents = (picture.mean + picture.std * torch.randn(16, 8, 8, generator=generator))[None]
    noise = torch.randn(latents.shape, generator=generator)
    sigma = 1 - int(1000 * torch.rand(1, generator=generator)) / 1000
    count = int(
        draw_offsets(rollout, torch.tensor([sigma]), step=0, generator=seeded(SEED, "rollout", 0))
    )
    assert count > 1
    network = dense_transformer(stored_tensors("bf16"))

    def velocity(noisy: Tensor, at: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = network(
                hidden_states=FluxPipeline._pack_latents(noisy, 1, 16, 8, 8),
                encoder_hidden_states=text.prompt_embeds[None],
                pooled_projections=text.pooled[None],
                timestep=at,
                guidance=torch.ones(1),
                txt_ids=torch.zeros(len(text.prompt_embeds), 3),
                img_ids=FluxPipeline._prepare_latent_image_ids(
                    1, 4, 4, torch.device("cpu"), torch.float32
                ),
                return_dict=False,
            )[0]
        return FluxPipeline._unpack_latents(tokens, 64, 64, 8)

    start = sigma + count / 1000
    begun = (1 - start) * latents + start * noise
    noisy = by_diffusers(begun, start, count, velocity)
    error = velocity(noisy, torch.tensor([sigma])) - (noise - latents)
    assert found[0] == pytest.approx(error.square().mean().item(), rel=1e-4)
    straight = (1 - sigma) * latents + sigma * noise
    assert not torch.allclose(noisy, straight, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_offset": 101}, r"has 0 \(off\) to 100 timesteps, got 101"),
        ({"offsets": "all"}, "Unknown kind of rollout offsets 'all'"),
        ({"ramp": "square"}, "Unknown rollout ramp 'square'. Choose one of: linear, cosine"),
        ({"probability": 1.5}, "between 0 and 1, got 1.5"),
        ({"start_probability": -0.1}, "between 0 and 1, got -0.1"),
        ({"ramp_steps": -1}, r"must be 0 \(none\) or more steps long, got -1"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutSettings(**settings)
