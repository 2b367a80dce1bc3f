"""A tiny FLUX and caches of random tensors, for tests that train."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from atelier.trainers.caches import LatentCache, LatentEntry, PromptCache, PromptEntry
from atelier.trainers.entries import EntryFiles
from atelier.trainers.loop import TrainingData

CONTEXT, VECTOR, TEXT_TOKENS = 128, 64, 8


def training_data(
    folder: Path,
    sizes: tuple[tuple[int, int], ...] = ((64, 64),) * 4,
    *,
    std: float = 0.1,
    text_tokens: int = TEXT_TOKENS,
    widths: tuple[int, int] = (CONTEXT, VECTOR),
) -> TrainingData:
    """One record per size in pixels, with random latents and prompt embeddings of `widths`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    files, pictures, texts = EntryFiles(folder), [], []
    for index, (width, height) in enumerate(sizes):
        shape, caption = (16, height // 8, width // 8), f"caption {index}"
        picture = LatentEntry(
            record=_key(f"record {index}"),
            key=_key(f"picture {index}"),
            caption=caption,
            width=width,
            height=height,
        )
        text = PromptEntry(text=caption, key=_key(caption))
        files.write(picture.key, {"mean": draw(*shape), "std": torch.full(shape, std)})
        embeds = {"prompt_embeds": draw(text_tokens, widths[0]), "pooled": draw(widths[1])}
        files.write(text.key, embeds)
        pictures.append(picture)
        texts.append(text)
    return TrainingData(
        latents=LatentCache(folder=str(folder), encoder="vae", entries=tuple(pictures)),
        prompts=PromptCache(
            folder=str(folder), encoder="clip", length=text_tokens, entries=tuple(texts)
        ),
    )


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
