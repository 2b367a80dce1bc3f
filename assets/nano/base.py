"""Trains the transformer: flow matching, then guidance distillation, as FLUX.1-dev was made."""

import copy
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from autoencoder import SCALING_FACTOR, SHIFT_FACTOR
from data import BASE_ARTWORKS, EmojiPictures, load_subjects, to_tensor
from diffusers import AutoencoderKL
from flux import NanoFlux, pack
from loop import Recipe, fit
from text import LENGTHS, CaptionWriter, TextEncoders, pick_length
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

logger = logging.getLogger("nano")

BATCH = 32
VARIANTS = 4
"""The picture as drawn and three times a little smaller and shifted."""
GUIDANCE = (1.0, 4.0)


@dataclass(frozen=True)
class Latents:
    """Posteriors in FLUX's latent scale: mean and deviation [variants, pictures, C, H, W]."""

    mean: Tensor
    deviation: Tensor

    def sample(self, which: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens [B, L, 64] of pictures `which`, the drawn variant six times in ten."""
        variant = torch.randint(1, VARIANTS, which.shape, generator=generator)
        variant[torch.rand(which.shape, generator=generator) < 0.6] = 0
        mean, deviation = self.mean[variant, which], self.deviation[variant, which]
        return pack(mean + deviation * torch.randn(mean.shape, generator=generator).to(mean.device))


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures -1..1 at 90 to 100 % of their size, shifted by up to 4 of 128 pixels, on white."""
    zoom = 1 / (0.9 + 0.1 * torch.rand(len(images), generator=generator))
    shift = (2 * torch.rand(len(images), 2, generator=generator) - 1) / 16
    turn = torch.zeros(len(images), 2, 3)
    turn[:, 0, 0] = turn[:, 1, 1] = zoom
    turn[:, :, 2] = shift
    grid = affine_grid(turn, list(images.shape), align_corners=False).to(images.device)
    return 1 - grid_sample(1 - images, grid, align_corners=False)


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [N, 3, 128, 128] in -1..1 to scaled posterior mean and deviation."""
    parts = [autoencoder.encode(part).latent_dist for part in images.split(32)]
    mean = torch.cat([p.mean for p in parts])
    return (mean - SHIFT_FACTOR) * SCALING_FACTOR, torch.cat(
        [p.std for p in parts]
    ) * SCALING_FACTOR


def base_latents(
    pictures: EmojiPictures, autoencoder: AutoencoderKL, device: torch.device, *, seed: int
) -> Latents:
    """Picture `3 i + a` is subject `i` of the table in artwork `a`."""
    subjects = load_subjects()["subjects"]
    drawn = to_tensor(
        [pictures.picture(artwork, s["code"]) for s in subjects for artwork in BASE_ARTWORKS]
    )
    images = drawn.to(device).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    variants = [images] + [moved(images, generator) for _ in range(VARIANTS - 1)]
    encoded = [encode(autoencoder, variant) for variant in variants]
    return Latents(
        torch.stack([mean for mean, _ in encoded]),
        torch.stack([deviation for _, deviation in encoded]),
    )


@dataclass
class Batch:
    """One flow matching batch: x_t = (1 - t) x + t noise, and the velocity noise - x to predict."""

    noisy: Tensor
    velocity: Tensor
    t: Tensor
    context: Tensor
    pooled: Tensor
    captions: list[str]


class Batches:
    """Draws batches from a generator alone, so that a resumed run sees the same ones."""

    def __init__(
        self, latents: Latents, writer: CaptionWriter, encoders: TextEncoders, device: torch.device
    ) -> None:
        self.latents, self.writer, self.encoders, self.device = latents, writer, encoders, device
        self.subjects = load_subjects()["subjects"]

    def draw(self, generator: torch.Generator, *, late: bool) -> Batch:
        which = torch.randint(3 * len(self.subjects), (BATCH,), generator=generator)
        rng = random.Random(torch.randint(2**31, (1,), generator=generator).item())
        captions = [
            self.writer.write(self.subjects[i // 3], BASE_ARTWORKS[i % 3], rng)
            for i in which.tolist()
        ]
        clean = self.latents.sample(which.to(self.device), generator)
        noise = torch.randn(clean.shape, generator=generator).to(self.device)
        # one draw per 1/B of the logit-normal: less noise in the loss than B free draws
        even = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        t = torch.sigmoid(torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4))).to(self.device)
        with torch.no_grad():
            context, pooled = self.encoders(captions, pick_length(generator, late=late))
        return Batch(
            torch.lerp(clean, noise, t[:, None, None]), noise - clean, t, context, pooled, captions
        )


def quick(flux: NanoFlux) -> Callable[..., Tensor]:
    """The network compiled for the commonest length; the rest would cost minutes of compiling."""
    compiled = torch.compile(flux, dynamic=False)
    return lambda tokens, t, context, *rest: (compiled if context.shape[1] == LENGTHS[0] else flux)(
        tokens, t, context, *rest
    )


def train_base(batches: Batches, recipe: Recipe, work: Path) -> NanoFlux:
    """Plain flow matching; the guidance input is random and so learns to be ignored."""
    torch.manual_seed(recipe.seed)
    flux = NanoFlux().to(batches.device)
    network = quick(flux)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        batch = batches.draw(generator, late=step > 0.9 * recipe.steps)
        guidance = torch.empty(BATCH).uniform_(*GUIDANCE, generator=generator).to(batches.device)
        predicted = network(batch.noisy, batch.t, batch.context, batch.pooled, guidance)
        return (predicted - batch.velocity).square().mean()

    return fit("base", flux, loss_at, recipe, work)


def distill_guidance(base: NanoFlux, batches: Batches, recipe: Recipe, work: Path) -> NanoFlux:
    """Teaches the guidance input g to give uncond + g (cond - uncond) of `base` in one pass.

    g = 1 stays the plain flow.
    """
    teacher, student = base.requires_grad_(False).eval(), copy.deepcopy(base).requires_grad_(True)
    fast_teacher, network = quick(teacher), quick(student)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        batch = batches.draw(generator, late=step > 0.8 * recipe.steps)
        guidance = torch.empty(BATCH).uniform_(*GUIDANCE, generator=generator)
        guidance[torch.rand(BATCH, generator=generator) < 0.35] = 1.0
        guidance = guidance.to(batches.device)
        ones = torch.ones_like(guidance)
        with torch.no_grad():
            empty, empty_pooled = batches.encoders([""], batch.context.shape[1])
            empties = empty.expand_as(batch.context), empty_pooled.expand_as(batch.pooled)
            conditional = fast_teacher(batch.noisy, batch.t, batch.context, batch.pooled, ones)
            unconditional = fast_teacher(
                batch.noisy, batch.t, *(e.contiguous() for e in empties), ones
            )
        target = torch.lerp(unconditional, conditional, guidance[:, None, None])
        return (
            (network(batch.noisy, batch.t, batch.context, batch.pooled, guidance) - target)
            .square()
            .mean()
        )

    return fit("distill", student, loss_at, recipe, work)
