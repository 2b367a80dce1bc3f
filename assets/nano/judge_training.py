"""Trains the judge on real pictures, and measures it on pictures it has not seen."""

import json
import logging
from pathlib import Path

import torch
from base import moved
from data import ARTWORKS, EmojiPictures, load_subjects, to_tensor
from diffusers import AutoencoderKL
from judge import STYLE_WIDTHS, SUBJECT_WIDTHS, Judge, classifier
from loop import Recipe, fit
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import (
    affine_grid,
    avg_pool2d,
    cross_entropy,
    grid_sample,
    interpolate,
    one_hot,
)

logger = logging.getLogger("nano")


@torch.no_grad()
def real_pictures(
    pictures: EmojiPictures, autoencoder: AutoencoderKL, codes: list[str], device: torch.device
) -> Tensor:
    """[2, codes, 4, 3, 128, 128] uint8: as drawn; and smaller, moved and through the autoencoder.

    Half of what a classifier sees has the decoder's texture, so that it cannot tell artworks or
    generated pictures by it.
    """
    drawn = to_tensor([pictures.picture(artwork, code) for code in codes for artwork in ARTWORKS])
    generator, decoded = torch.Generator().manual_seed(1), []
    for part in drawn.split(32):
        images = moved(part.to(device).float() / 127.5 - 1, generator)
        back = autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample
        decoded.append(((back.clamp(-1, 1) + 1) * 127.5).round().byte().cpu())
    return torch.cat([drawn, *decoded]).view(2, len(codes), len(ARTWORKS), *drawn.shape[1:])


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [B, 3, 128, 128] to 0..1.

    Random are size, place, margin, turn, colours, contrast, sharpness and noise.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    ink = 1 - images.float() / 255
    zoom, stretch, angle = 1 / uniform(0.55, 1.2), uniform(0.92, 1.08), uniform(-0.15, 0.15)
    turn = torch.stack(
        (
            zoom * stretch * angle.cos(),
            -zoom * angle.sin(),
            zoom * angle.sin(),
            zoom / stretch * angle.cos(),
        ),
        -1,
    )
    turn = torch.cat((turn.view(count, 2, 2), uniform(-0.25, 0.25, 2, 1)), dim=-1)
    ink = grid_sample(
        ink, affine_grid(turn, list(ink.shape), align_corners=False), align_corners=False
    )
    mixing = torch.eye(3) + uniform(-0.15, 0.15, 3, 3)
    ink = torch.einsum("bchw,bdc->bdhw", ink, mixing / mixing.sum(-1, keepdim=True)) * uniform(
        0.8, 1.1, 1, 1, 1
    )
    soft = interpolate(avg_pool2d(ink, 2), scale_factor=2, mode="bilinear")
    amount = uniform(0, 1.2, 1, 1, 1).clamp(max=1) * (uniform(0, 1, 1, 1, 1) < 0.5)
    return (
        1 - torch.lerp(ink, soft, amount) + 0.02 * torch.randn(ink.shape, generator=generator)
    ).clamp(0, 1)


def train_classifier(
    name: str, real: Tensor, labels: Tensor, widths: tuple[int, ...], recipe: Recipe, work: Path
) -> nn.Module:
    """`real` [versions, N, 3, 128, 128] uint8 with `labels` [N]."""
    torch.manual_seed(recipe.seed)
    num_classes = int(labels.max()) + 1
    network = classifier(widths, num_classes)

    def loss_at(_: int, generator: torch.Generator) -> Tensor:
        which = torch.randint(len(labels), (64,), generator=generator)
        version = torch.randint(len(real), (64,), generator=generator)
        network.train()
        target = one_hot(labels[which], num_classes) * 0.9 + 0.1 / num_classes
        return cross_entropy(network(augment(real[version, which], generator)), target)

    return fit(name, network, loss_at, recipe, work).eval()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers on uint8 pictures [N, 3, 128, 128]."""
    answers = torch.cat([network(part.float() / 255).argmax(-1) for part in images.split(64)])
    return (answers == labels).float().mean().item()


def train_judge(
    pictures: EmojiPictures,
    autoencoder: AutoencoderKL,
    recipes: tuple[Recipe, Recipe],
    work: Path,
    device: torch.device,
) -> dict:
    """Writes `judge.safetensors` and returns accuracies on real pictures that were not seen.

    The recipes are those of the artwork half and of the subject half.
    """
    table = load_subjects()
    codes = [s["code"] for s in table["subjects"]]
    others, own = (real_pictures(pictures, autoencoder, c, device) for c in (table["judge"], codes))
    artworks = torch.arange(len(ARTWORKS))
    style = train_classifier(
        "judge_style",
        others.flatten(1, 2),
        artworks.repeat(len(table["judge"])),
        STYLE_WIDTHS,
        recipes[0],
        work,
    )
    numbers = torch.arange(len(codes))
    figures = {
        "style, real pictures of other subjects": accuracy(
            style, own[0].flatten(0, 1), artworks.repeat(len(codes))
        ),
        "style, the same smaller, moved and decoded": accuracy(
            style, own[1].flatten(0, 1), artworks.repeat(len(codes))
        ),
    }
    for left_out in (
        None,
        "twemoji",
        "openmoji",
    ):  # the judge itself, then two that show what it is worth
        kept = [a for a, artwork in enumerate(ARTWORKS) if artwork != left_out]
        name = f"judge_subject_without_{left_out}" if left_out else "judge_subject"
        labels = numbers.repeat_interleave(len(kept))
        network = train_classifier(
            name, own[:, :, kept].flatten(1, 2), labels, SUBJECT_WIDTHS, recipes[1], work
        )
        if left_out is None:
            save_judge(Judge(style, network, codes), work / "judge.safetensors")
        else:
            figures[f"subject, {left_out} never seen"] = accuracy(
                network, own[0, :, ARTWORKS.index(left_out)], numbers
            )
    logger.info("judge: %s", figures)
    return figures


def save_judge(judge: Judge, path: Path) -> None:
    nets = {"style": judge.style_net, "subject": judge.subject_net}
    tensors = {
        f"{name}.{key}": value
        for name, net in nets.items()
        for key, value in net.state_dict().items()
    }
    halves = {
        key: value.half() if value.is_floating_point() else value for key, value in tensors.items()
    }
    save_file(halves, path, metadata={"format": "pt", "subjects": json.dumps(judge.subjects)})
