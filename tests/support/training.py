"""A tiny FLUX and caches of random tensors, for tests that train."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from atelier.trainers.caches import LatentCache, LatentEntry, LatentSubset, PromptCache, PromptEntry
from atelier.trainers.data import TrainingData
from atelier.trainers.shards import Shards

CONTEXT, VECTOR, TEXT_TOKENS = 128, 64, 8


def conditioning(seed: int, **options: Any) -> list:
    """A random prompt for a sampler, as ComfyUI's CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(1, TEXT_TOKENS, CONTEXT, generator=generator)
    pooled = torch.randn(1, VECTOR, generator=generator)
    return [[embeds, {"pooled_output": pooled, **options}]]


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

    pictures, texts, stored = [], [], {}
    for index, (width, height) in enumerate(sizes):
        shape, caption = (16, height // 8, width // 8), f"caption {index}"
        picture = LatentEntry(
            record=_key(f"record {index}"),
            keys=(_key(f"picture {index}"),),
            texts=((caption,),),
            width=width,
            height=height,
        )
        text = PromptEntry(text=caption, key=_key(caption))
        stored[picture.name] = {"mean": draw(*shape), "std": torch.full(shape, std)}
        embeds = {"prompt_embeds": draw(text_tokens, widths[0]), "pooled": draw(widths[1])}
        stored[text.key] = embeds
        pictures.append(picture)
        texts.append(text)
    write_entries(folder, stored)
    return TrainingData(
        latents=LatentCache(
            folder=str(folder),
            encoder="vae",
            subsets=(LatentSubset(name="pictures", entries=tuple(pictures)),),
        ),
        prompts=PromptCache(
            folder=str(folder), encoder="clip", length=text_tokens, entries=tuple(texts)
        ),
    )


def with_entries(cache: LatentCache, entries: tuple[LatentEntry, ...]) -> LatentCache:
    """A cache of one subset with other entries."""
    (subset,) = cache.subsets
    return dataclasses.replace(cache, subsets=(dataclasses.replace(subset, entries=entries),))


def write_entries(folder: Path, entries: dict[str, dict[str, torch.Tensor]]) -> None:
    """One shard of these entries."""
    with Shards(folder).writing() as write:
        for key, tensors in entries.items():
            write(key, tensors)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
