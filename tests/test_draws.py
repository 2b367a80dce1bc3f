"""What a micro-step draws beside noise and sigmas, and that it leaves both as they are."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atelier.trainers.config import JobSettings, TrainSettings
from atelier.trainers.draws import Draw, draw, trained_config
from atelier.trainers.flow import seeded
from atelier.trainers.flow_remarks import flow_remarks
from atelier.trainers.flow_settings import (
    FlowSettings,
    LossSettings,
    RolloutSettings,
    TimestepSettings,
    parse_sigmas,
)
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.load import load_flux
from atelier.trainers.step import TrainState
from dense import dense_transformer, stored_tensors
from flux_files import write_flux

LATENTS = torch.randn(8, 16, 4, 4, generator=torch.Generator().manual_seed(9))


def drawn(micro_step: int = 3, guidance: float = 1.0, predict=None, **flow: Any) -> Draw:
    settings = TrainSettings(guidance=guidance, flow=FlowSettings(**flow), seed=7)
    return draw(settings, LATENTS, seeded(7, "micro-step", micro_step), micro_step, predict)


PLAIN = drawn()


@pytest.mark.parametrize(
    "flow",
    [{"guidance_max": 4.0}, {"rollout": RolloutSettings(max_offset=5, probability=1.0)}],
    ids=["guidance", "rollout"],
)
def test_a_setting_leaves_the_noise_of_a_seed(flow: dict) -> None:
    found = drawn(**flow, predict=lambda at: torch.ones_like(at.noisy))
    assert torch.equal(found.noise, PLAIN.noise)
    assert torch.equal(found.sigma, PLAIN.sigma)


def test_a_rollout_asks_the_network_with_what_the_sample_has() -> None:
    asked: list[Draw] = []

    def predict(at: Draw) -> torch.Tensor:
        asked.append(at)
        return torch.ones_like(at.noisy)

    rollout = RolloutSettings(max_offset=5, probability=1.0)
    found = drawn(guidance_max=4.0, rollout=rollout, predict=predict)
    assert 1 <= len(asked) <= 5
    assert all(torch.equal(at.guidance, found.guidance) for at in asked)
    assert bool((asked[0].sigma > found.sigma).any())
    assert not torch.equal(found.noisy, PLAIN.noisy)


def test_the_noise_offset_is_one_number_for_each_channel_of_each_sample() -> None:
    parts = [drawn(step, noise_offset=0.3).noise - drawn(step).noise for step in range(16)]
    offsets = torch.stack(parts)
    torch.testing.assert_close(offsets, offsets[..., :1, :1].expand_as(offsets))
    means = offsets.mean((-2, -1)).flatten().numpy()  # 16 steps x 8 samples x 16 channels
    assert len(np.unique(means.round(5))) > 2000
    assert means.std() == pytest.approx(0.3, rel=0.05)
    assert means.mean() == pytest.approx(0.0, abs=0.03)


def test_noise_with_an_offset_is_what_the_pictures_are_mixed_with() -> None:
    found = drawn(noise_offset=0.3)
    sigma = found.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.noisy, (1 - sigma) * LATENTS + sigma * found.noise)


def test_guidance_is_drawn_evenly_between_both() -> None:
    found = torch.cat([drawn(step, 2.0, guidance_max=5.0).guidance for step in range(500)])
    values = np.sort(found.double().numpy())
    places = np.arange(1, len(values) + 1) / len(values)
    assert values.min() >= 2
    assert values.max() <= 5
    distance = np.abs(places - (values - 2) / 3).max()
    assert distance < 1.63 / math.sqrt(len(values))  # Kolmogorov-Smirnov at 1 %


def test_without_a_range_the_guidance_is_constant() -> None:
    assert drawn(guidance=3.5).guidance.tolist() == [3.5] * 8


def test_each_sample_has_its_guidance(tmp_path: Path) -> None:
    base = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    transformer = build_transformer(base.store, base.config, torch.float32)
    values = inputs()
    with torch.no_grad():
        both = velocity(transformer, **values, guidance=torch.tensor([1.0, 4.0]))
        alone = [velocity(transformer, **values, guidance=guidance) for guidance in (1.0, 4.0)]
    torch.testing.assert_close(both, torch.stack([alone[0][0], alone[1][1]]))
    assert not torch.allclose(alone[0][1], alone[1][1], atol=1e-3)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(2, 16, 8, 4, generator=generator),
        "sigma": torch.tensor([0.7, 0.2]),
        "prompt_embeds": torch.randn(2, 10, 128, generator=generator),
        "pooled": torch.randn(2, 64, generator=generator),
    }


def test_a_bypassed_guidance_is_an_embedding_of_zeros(tmp_path: Path) -> None:
    """Compared with diffusers' network whose guidance embedder was made to give 0."""
    base = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    config = trained_config(base.config, FlowSettings(bypass_guidance=True))
    transformer = build_transformer(base.store, config, torch.float32)
    tensors = stored_tensors("bf16")
    for name in ("weight", "bias"):
        tensors[f"guidance_in.out_layer.{name}"].zero_()
    expected = dense_transformer(tensors)
    assert expected.config.guidance_embeds
    with torch.no_grad():
        found = velocity(transformer, **inputs(), guidance=1.0)
        wanted = velocity(expected, **inputs(), guidance=1.0)
        usual = velocity(
            build_transformer(base.store, base.config, torch.float32), **inputs(), guidance=1.0
        )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(found, usual, atol=1e-3)


def test_a_training_with_a_bypassed_guidance_has_that_network(tmp_path: Path) -> None:
    base = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    flow = FlowSettings(bypass_guidance=True)
    state = TrainState(base, JobSettings(train=TrainSettings(flow=flow)))
    assert not state.transformer.config.guidance_embeds
    assert base.config.guidance  # that of sampling is as it was


@pytest.mark.parametrize(
    ("text", "values"),
    [("1, 0.75,0.5", (1.0, 0.75, 0.5)), ("1000 250", (1000.0, 250.0)), ("", ())],
)
def test_a_list_is_read(text: str, values: tuple[float, ...]) -> None:
    assert parse_sigmas(text) == values


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: parse_sigmas("0.5; a"), "numbers with commas, .* got '0.5; a'"),
        (lambda: FlowSettings(noise_offset=2.0), r"between 0 \(off\) and 1, got 2.0"),
        (lambda: FlowSettings(noise_offset=math.nan), "got nan"),
        (lambda: FlowSettings(guidance_max=-1.0), r"between 0 \(off\) and 100, got -1.0"),
        (
            lambda: FlowSettings(guidance_max=4.0, bypass_guidance=True),
            "bypassed and drawn up to 4.0 at once",
        ),
        (lambda: drawn(guidance=3.5, guidance_max=2.0), "from 3.5 up to 2.0, which is less"),
    ],
)
def test_settings_that_cannot_be_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("train", "takes_guidance", "expected"),
    [
        ({}, True, []),
        ({"guidance": 3.5}, True, []),
        ({"guidance": 3.5}, False, ["guidance has no effect: this model takes no"]),
        (
            {"flow": FlowSettings(guidance_max=4.0)},
            False,
            ["guidance_max has no effect: this model takes no"],
        ),
        (
            {"guidance": 3.5, "flow": FlowSettings(bypass_guidance=True)},
            True,
            ["guidance has no effect: bypass_guidance leaves it out"],
        ),
        (
            {"flow": FlowSettings(timesteps=TimestepSettings(mode_scale=1.0, custom=(0.5,)))},
            True,
            [
                "custom has no effect with the timestep sampling 'uniform'. It belongs to custom.",
                "mode_scale has no effect with the timestep sampling 'uniform'. It belongs to mode",
            ],
        ),
        (
            {
                "flow": FlowSettings(
                    timesteps=TimestepSettings(sampling="shift", shift=3.0, sigmoid_scale=2.0)
                )
            },
            True,
            [],
        ),
        (
            {
                "flow": FlowSettings(
                    timesteps=TimestepSettings(sampling="flux_shift", auto_shift=True),
                    loss=LossSettings(huber_c=0.2),
                )
            },
            True,
            ["auto_shift has no effect", "huber_c has no effect with the loss mse"],
        ),
        (
            {"flow": FlowSettings(timesteps=TimestepSettings(sampling="fast", shift=3.0))},
            True,
            ["The shift moves the steps of the timestep sampling 'fast' too"],
        ),
        ({"flow": FlowSettings(timesteps=TimestepSettings(sampling="fast", shift=1))}, True, []),
        (
            {"flow": FlowSettings(rollout=RolloutSettings(probability=1.0, ramp="cosine"))},
            True,
            ["rollout_probability has no effect: rollout", "rollout_ramp has no effect: rollout"],
        ),
        (
            {"flow": FlowSettings(rollout=RolloutSettings(max_offset=5, start_probability=0.2))},
            True,
            ["rollout_start has no effect: rollout_ramp_steps is 0"],
        ),
        (
            {"flow": FlowSettings(rollout=RolloutSettings(max_offset=5, ramp_steps=200))},
            True,
            ["ramp of 200 steps is longer than this training of 100: at its end 25% .* not 50%"],
        ),
        (
            {"flow": FlowSettings(rollout=RolloutSettings(max_offset=5, probability=0.0))},
            True,
            ["rollout has no effect: its probability is 0"],
        ),
    ],
)
def test_settings_without_effect_are_told(
    train: dict[str, Any], takes_guidance: bool, expected: list[str]
) -> None:
    found = flow_remarks(TrainSettings(**train), takes_guidance=takes_guidance, num_steps=100)
    assert len(found) == len(expected)
    for sentence, start in zip(found, expected, strict=True):
        assert re.search(start, sentence)
