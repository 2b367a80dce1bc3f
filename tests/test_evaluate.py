"""The evaluation loss against a computation with diffusers' own packing, picture by picture."""

from __future__ import annotations

import pytest
import torch
from atelier.trainers.evaluate import EVAL_SIGMAS, eval_loss
from atelier.trainers.flow import seeded
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

GUIDANCE = 1.5
SEED = 7


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)


@pytest.fixture
def task() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(3, 16, 4, 6, generator=generator),
        "prompt_embeds": torch.randn(3, 5, 24, generator=generator),
        "pooled": torch.randn(3, 12, generator=generator),
    }


def measure(transformer, task: dict[str, Tensor], **options) -> float:
    options = {"guidance": GUIDANCE, "seed": SEED, **options}
    return eval_loss(
        transformer,
        task["latents"],
        prompt_embeds=task["prompt_embeds"],
        pooled=task["pooled"],
        **options,
    )


def reference(transformer, task: dict[str, Tensor], sigma: float, number: int, row: int) -> float:
    """The loss of one picture at one sigma, by diffusers' functions."""
    clean = task["latents"][row : row + 1]
    noise = torch.randn(clean.shape[1:], generator=seeded(SEED, "eval", number, row))[None]
    noisy = (1 - sigma) * clean + sigma * noise
    prediction = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, 1, 16, 4, 6),
        encoder_hidden_states=task["prompt_embeds"][row : row + 1],
        pooled_projections=task["pooled"][row : row + 1],
        timestep=torch.tensor([sigma]),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([GUIDANCE]),
    ).sample
    target = FluxPipeline._pack_latents(noise - clean, 1, 16, 4, 6)
    return float((prediction - target).square().mean())


def test_the_loss_equals_diffusers_picture_by_picture(transformer, task) -> None:
    expected = [
        reference(transformer, task, sigma, number, row)
        for number, sigma in enumerate(EVAL_SIGMAS)
        for row in range(3)
    ]
    assert measure(transformer, task) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_batch_size_does_not_change_the_loss(transformer, task) -> None:
    assert measure(transformer, task, batch_size=2) == pytest.approx(
        measure(transformer, task, batch_size=3), rel=1e-6
    )


def test_the_noise_depends_on_the_seed_alone(transformer, task) -> None:
    torch.manual_seed(3)
    first = measure(transformer, task)
    torch.manual_seed(4)
    assert measure(transformer, task) == first
    assert measure(transformer, task, seed=SEED + 1) != first


def test_sigmas_are_the_middles_of_equal_parts() -> None:
    parts = len(EVAL_SIGMAS)
    assert [(number + 0.5) / parts for number in range(parts)] == list(EVAL_SIGMAS)
