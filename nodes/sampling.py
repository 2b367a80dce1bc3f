"""ComfyUI's own sampling: prompts as CLIP Text Encode makes them, latents as of KSampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.sample
import comfy.samplers
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ..trainers.flux import LATENT_CHANNELS
from .validation import Sampler

SAMPLERS: tuple[str, ...] = tuple(comfy.samplers.KSampler.SAMPLERS)
_HIDDEN = -1e4
"""Added to the logarithm of what a token is seen by: nothing is left of it in any dtype."""
SCHEDULERS: tuple[str, ...] = tuple(comfy.samplers.KSampler.SCHEDULERS)


def encode_prompt(clip: Any, text: str, guidance: float, *, hides_padding: bool = False) -> list:
    """The CONDITIONING that CLIP Text Encode and FluxGuidance give for a prompt; if it
    `hides_padding`, with an attention mask for models trained without seeing it.

    Raises:
        ValueError: if padding is to be hidden and the CLIP has no T5.
    """
    tokens = clip.tokenize(text)
    if hides_padding and "t5xxl" not in tokens:
        raise ValueError(
            "Padding is hidden of T5's tokens, and this CLIP has no T5. Load FLUX's two text "
            "encoders with Load Quantized Text Encoders, or turn mask_padding off."
        )
    added = {"guidance": guidance, **(_mask_of_padding(tokens["t5xxl"]) if hides_padding else {})}
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    return [[embeds, {**options, **added}] for embeds, options in conditioning]


def _mask_of_padding(tokens: list[list[tuple]]) -> dict[str, Any]:
    """The options with which ComfyUI's FLUX hides the padding among T5's tokens from all others: a
    bias [1, T + 1, T + 1] for the text and a picture of one token, which it enlarges."""
    # A token may be an embedding in place of a number; padding is 0.
    is_text = [not (isinstance(one, int) and one == 0) for part in tokens for one, *_ in part]
    # Not infinite: enlarging multiplies it by 0.
    columns = torch.where(torch.tensor([*is_text, True]), 0.0, _HIDDEN)
    mask = columns.expand(1, len(columns), -1).contiguous()
    return {"attention_mask": mask, "attention_mask_img_shape": (1, 1)}


def draw_latents(
    model: Any,
    positive: list,
    negative: list,
    *,
    width: int,
    height: int,
    sampler: Sampler,
    show: Callable[[Image.Image], None],
) -> Tensor:
    """Latents [1, 16, height/8, width/8] drawn as KSampler does.

    Args:
        show: called after each step with a small picture of the latents without their noise.
    """
    previewer = _previewer(model)

    def after_step(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        _, picture, _ = previewer.decode_latent_to_preview_image("JPEG", x0)
        show(picture)

    empty = torch.zeros(1, LATENT_CHANNELS, height // 8, width // 8)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, sampler.seed),
        sampler.steps,
        sampler.cfg,
        sampler.name,
        sampler.scheduler,
        positive,
        negative,
        empty,
        callback=after_step,
        disable_pbar=True,
        seed=sampler.seed,
    )


def _previewer(model: Any) -> Any:
    """The one that the user chose for all samplers, else the quick one, which needs no file."""
    latent_format = model.model.latent_format
    chosen = latent_preview.get_previewer(model.load_device, latent_format)
    return chosen or latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors,
        latent_format.latent_rgb_factors_bias,
        latent_format.latent_rgb_factors_reshape,
    )
