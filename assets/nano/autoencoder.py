"""The 16-channel KL autoencoder: its shape, its training, and latents scaled as FLUX's are."""

import logging
from pathlib import Path

import torch
from data import EmojiPictures, autoencoder_pictures, to_tensor
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from loop import Recipe, fit, save
from torch import Tensor, nn

logger = logging.getLogger("nano")

LATENT_CHANNELS = 16
# ComfyUI's latent_formats.Flux has these two built in.
SHIFT_FACTOR, SCALING_FACTOR = 0.1159, 0.3611


def new_autoencoder() -> AutoencoderKL:
    """64 channels wide, one residual block per decoder level: as narrow as the norms bear."""
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(64, 64, 64, 64),
        layers_per_block=0,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=32,
        sample_size=128,
        shift_factor=SHIFT_FACTOR,
        scaling_factor=SCALING_FACTOR,
    )
    for module in autoencoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    last_blocks = (
        autoencoder.encoder.mid_block.resnets[-1],
        autoencoder.decoder.up_blocks[-1].resnets[-1],
    )
    for half, last in zip((autoencoder.encoder, autoencoder.decoder), last_blocks, strict=True):
        pass_colours(half.conv_norm_out, last.conv2)
    autoencoder.quant_conv.bias.data[LATENT_CHANNELS:] = -5.0  # little noise to start with
    return autoencoder


def pass_colours(norm: nn.GroupNorm, before: nn.Conv2d, *, constant: float = 8.0) -> None:
    """Starts a norm of two channels per group as nearly the identity on the even ones.

    ComfyUI's autoencoder has 32 groups whatever the width, which at 64 channels is close to an
    instance norm and washes out flat colours. A large constant in the odd channel of each group
    holds the group's statistics still.
    """
    before.bias.data[1::2] = constant
    norm.weight.data[::2] = norm.bias.data[::2] = constant / 2
    norm.weight.data[1::2] = 0.1


def signed(images: Tensor, device: torch.device) -> Tensor:
    """uint8 to -1..1, channels last."""
    return images.to(device).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def crops(images: Tensor, size_px: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random crops [count, 3, size, size] of random pictures."""
    room = images.shape[-1] - size_px + 1
    which = torch.randint(len(images), (count,), generator=generator).tolist()
    tops, lefts = torch.randint(room, (2, count), generator=generator).tolist()
    return torch.stack(
        [
            images[i, :, y : y + size_px, x : x + size_px]
            for i, y, x in zip(which, tops, lefts, strict=True)
        ]
    )


def reconstruction_loss(
    autoencoder: AutoencoderKL, pixels: Tensor, generator: torch.Generator
) -> Tensor:
    """L1, squared and edge differences, and a small KL that keeps the latents noisy."""
    posterior = autoencoder.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    difference = autoencoder.decode(posterior.mean + posterior.std * noise).sample - pixels
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return (
        difference.abs().mean() + 2 * difference.square().mean() + 0.5 * edges + 5e-4 * divergence
    )


def train_autoencoder(
    pictures: EmojiPictures, recipe: Recipe, work: Path, device: torch.device
) -> AutoencoderKL:
    """Crops of 64 pixels for most of the time, whole pictures for the last fifth."""
    torch.manual_seed(recipe.seed)
    path = work / "pictures.pt"
    if not path.exists():
        save(autoencoder_pictures(pictures, seed=recipe.seed), path)
    train, held_out = torch.load(path)
    autoencoder = new_autoencoder().to(device, memory_format=torch.channels_last)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        size_px, count = (64, 16) if step < 0.8 * recipe.steps else (128, 4)
        return reconstruction_loss(
            autoencoder, signed(crops(train, size_px, count, generator), device), generator
        )

    fit("vae", autoencoder, loss_at, recipe, work)
    fold_statistics(autoencoder, train[:: len(train) // 600], device)
    openmoji = [
        pictures.picture("openmoji", code)
        for code in sorted(pictures.names)
        if code in pictures.sources["openmoji"]
    ]
    for name, images in (("held out", held_out), ("OpenMoji", to_tensor(openmoji[::12]))):
        logger.info("autoencoder, %s: %.2f dB", name, psnr(autoencoder, images, device))
    return autoencoder


@torch.no_grad()
def fold_statistics(autoencoder: AutoencoderKL, images: Tensor, device: torch.device) -> None:
    """Moves an exact affine map into quant_conv and its inverse into post_quant_conv.

    Afterwards (z - SHIFT_FACTOR) * SCALING_FACTOR has mean 0, deviation 1 per channel of `images`.
    """
    means = torch.cat(
        [autoencoder.encode(signed(part, device)).latent_dist.mean for part in images.split(16)]
    )
    mean, deviation = means.mean((0, 2, 3)), means.std((0, 2, 3))
    gain = 1 / (SCALING_FACTOR * deviation)
    offset = SHIFT_FACTOR - mean * gain
    channels = len(gain)
    quant, post = autoencoder.quant_conv, autoencoder.post_quant_conv
    quant.weight[:channels] *= gain[:, None, None, None]
    quant.bias[:channels] = quant.bias[:channels] * gain + offset
    quant.bias[channels:] += 2 * gain.log()  # log-variances scale with the square
    post.weight /= gain[None, :, None, None]
    post.bias -= (post.weight[:, :, 0, 0] * offset).sum(1)


@torch.no_grad()
def psnr(autoencoder: AutoencoderKL, images: Tensor, device: torch.device) -> float:
    """Mean over pictures, in dB, of what comes back from the posterior's mean."""
    values = []
    for part in images.split(16):
        pixels = signed(part, device)
        back = autoencoder.decode(autoencoder.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * ((back - pixels) / 2).square().mean((1, 2, 3)).log10())
    return torch.cat(values).mean().item()
