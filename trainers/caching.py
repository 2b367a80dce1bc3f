"""Filling the caches: only what is not on disk yet is encoded.

Every entry is keyed by what determines it (content, transform, encoder), never by its position: a
changed picture, caption or crop encodes just itself. Files hold exactly the dtype that the encoder
returned.

Shapes: B batch, C latent channels, H W pixels, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .buckets import Size
from .caches import LatentCache, LatentEntry, LatentSubset, PromptCache, PromptEntry, digest
from .config import require
from .dataset import Dataset, Record, Subset, mask_weights, open_picture
from .files import require_room
from .filling import OnProgress, fill
from .flux import LATENT_CHANNELS
from .masks import Mask
from .pictures import Transform, transform
from .shards import Shards

LATENTS = ("distribution", "one sample")
"""What is kept of a picture's latents: mean and deviation, so that every step draws a sample of its
own, or one such sample, in half the space."""

EncodePictures = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels [B, 3, H, W] in -1..1 to the mean and the deviation of the latents, each [B, C, h, w]
float32."""

EncodeTexts = Callable[[list[str]], tuple[Tensor, Tensor]]
"""B texts to prompt embeddings [B, L, D] and pooled embeddings [B, D2]."""


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """How pictures are encoded, besides the encoder."""

    kept: str = LATENTS[0]
    """One of LATENTS."""
    tile: int = 0
    """Pixels. Pictures with a longer side are encoded in tiles of this side, by the encoder; 0 is
    off. It belongs to the keys of those pictures, since tiles give slightly other numbers."""

    def __post_init__(self) -> None:
        require(
            self.kept in LATENTS,
            f"latents must be one of {', '.join(LATENTS)}, got {self.kept!r}.",
        )

    @property
    def is_sample(self) -> bool:
        return self.kept == LATENTS[1]

    def facts(self, how: Transform) -> list[object]:
        """What stands for this in a picture's key: nothing where it is the default."""
        is_tiled = 0 < self.tile < max(how.width, how.height)
        return [self.kept] * self.is_sample + [{"tile": self.tile}] * is_tiled


DEFAULT_LATENTS = LatentSettings()


def latent_cache(
    dataset: Dataset,
    encoder_id: str,
    folder: str | Path,
    settings: LatentSettings = DEFAULT_LATENTS,
) -> LatentCache:
    """What `cache_latents` will return, computed without touching a picture or the disk.

    Raises:
        ValueError: as `LatentCache`.
    """
    subsets = tuple(_latent_subset(subset, encoder_id, settings) for subset in dataset.subsets)
    return LatentCache(folder=os.path.abspath(folder), encoder=encoder_id, subsets=subsets)


def prompt_cache(
    texts: Iterable[str], encoder_id: str, length: int, folder: str | Path
) -> PromptCache:
    """What `cache_prompts` will return, computed without touching an encoder or the disk."""
    keys = {text: digest([text, length, encoder_id]) for text in (*texts, "")}
    entries = tuple(PromptEntry(text=text, key=key) for text, key in keys.items())
    folder = os.path.abspath(folder)
    return PromptCache(folder=folder, encoder=encoder_id, length=length, entries=entries)


def num_missing(cache: LatentCache | PromptCache) -> int:
    """How many entries have no file yet."""
    return len(Shards(cache.folder).missing(cache.keys))


def cache_latents(
    dataset: Dataset,
    encode: EncodePictures,
    encoder_id: str,
    folder: str | Path,
    *,
    settings: LatentSettings = DEFAULT_LATENTS,
    batch_size: int = 1,
    limit_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> LatentCache:
    """Encode the pictures that are not in `folder` yet, `batch_size` of one size at a time.

    `encode` is not called when nothing is missing. Whatever stops the work, what is done stays.

    Raises:
        ValueError: what is missing would take more than `limit_bytes` or than the disk has, a
            picture changed or broke, or the latents are not finite.
    """
    cache = latent_cache(dataset, encoder_id, folder, settings)
    wanted: dict[str, tuple[Record, Transform]] = {}
    masks: dict[str, tuple[Mask, Transform]] = {}
    for subset, cached in zip(dataset.subsets, cache.subsets, strict=True):
        for record, entry in zip(subset.records, cached.entries, strict=True):
            transforms = _transforms(subset, record)
            wanted |= {key: (record, how) for key, how in zip(entry.keys, transforms, strict=True)}
            if record.mask:
                hows = zip(entry.masks, transforms, strict=True)
                masks |= {key: (record.mask, how) for key, how in hows}

    def read(keys: list[str]) -> Tensor:
        batch = [wanted[key] for key in keys]
        return torch.stack([transform(open_picture(record), how) for record, how in batch])

    def encode_batch(keys: list[str], pixels: Tensor) -> Iterator[dict[str, Tensor]]:
        mean, std = encode(pixels)
        for index, key in enumerate(keys):
            _require_finite(mean[index], f"the picture {wanted[key][0].path}")
            if settings.is_sample:
                yield {"mean": _sample(mean[index], std[index], key)}
            else:
                yield {"mean": mean[index], "std": std[index]}

    def weigh(keys: list[str]) -> list[dict[str, Tensor]]:
        return [{"mask": mask_weights(*masks[key])} for key in keys]

    shards = Shards(folder)
    sizes = {key: (how.width, how.height) for key, (_, how) in wanted.items()}
    mask_sizes = {key: (how.width, how.height) for key, (_, how) in masks.items()}
    num_floats = LATENT_CHANNELS * (1 if settings.is_sample else 2)
    require_room(
        shards.folder,
        sum(num_floats * _latent_bytes(sizes[key]) for key in shards.missing(sizes))
        + sum(_latent_bytes(mask_sizes[key]) for key in shards.missing(mask_sizes)),
        limit_bytes,
    )
    fill(shards, sizes, batch_size, read, encode_batch, on_progress)
    if masks:
        fill(shards, mask_sizes, 1, weigh, lambda _, made: made, on_progress)
    return cache


def cache_prompts(
    texts: Iterable[str],
    encode: EncodeTexts,
    encoder_id: str,
    length: int,
    folder: str | Path,
    *,
    batch_size: int = 1,
    limit_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> PromptCache:
    """Encode the texts, and the empty one, that are not in `folder` yet.

    `encode` is not called when nothing is missing. Whatever stops the work, what is done stays.
    How much a text takes, only its encoder knows: the first one tells it, before it is written.

    Raises:
        ValueError: what is missing would take more than `limit_bytes` or than the disk has, or the
            embeddings are not finite.
    """
    cache = prompt_cache(texts, encoder_id, length, folder)
    texts_by_key = {entry.key: entry.text for entry in cache.entries}
    shards = Shards(folder)
    missing = shards.missing(texts_by_key)

    def encode_batch(keys: list[str], batch: list[str]) -> Iterator[dict[str, Tensor]]:
        embeds, pooled = encode(batch)
        if keys[0] == missing[0]:
            text_bytes = embeds[0].nbytes + pooled[0].nbytes
            require_room(shards.folder, len(missing) * text_bytes, limit_bytes)
        for index, text in enumerate(batch):
            _require_finite(embeds[index], f"the caption {text[:80]!r}")
            yield {"prompt_embeds": embeds[index], "pooled": pooled[index]}

    def texts_of(keys: list[str]) -> list[str]:
        return [texts_by_key[key] for key in keys]

    groups = dict.fromkeys(texts_by_key)  # all have one length, so any of them share a batch
    fill(shards, groups, batch_size, texts_of, encode_batch, on_progress)
    return cache


def _latent_subset(subset: Subset, encoder_id: str, settings: LatentSettings) -> LatentSubset:
    records = subset.records
    return LatentSubset(
        name=subset.name,
        entries=tuple(_latent_entry(subset, one, encoder_id, settings) for one in records),
        schedule=subset.schedule,
    )


def _latent_entry(
    subset: Subset, record: Record, encoder_id: str, settings: LatentSettings
) -> LatentEntry:
    transforms = _transforms(subset, record)
    keys = tuple(
        digest([record.content, how.facts(), encoder_id, *settings.facts(how)])
        for how in transforms
    )
    return LatentEntry(
        record=record.id,
        keys=keys,
        masks=tuple(_mask_key(record.mask, how) for how in transforms) if record.mask else (),
        texts=record.texts,
        dropout=subset.captions.dropout,
        is_regularization=subset.is_regularization,
        width=transforms[0].width,
        height=transforms[0].height,
        repeats=record.repeats,
    )


def _mask_key(mask: Mask, how: Transform) -> str:
    return digest(["mask", mask.content, mask.is_alpha, how.facts()])


def _transforms(subset: Subset, record: Record) -> tuple[Transform, ...]:
    return subset.pictures.transforms(subset.size_of(record), record.content)


def _sample(mean: Tensor, std: Tensor, key: str) -> Tensor:
    """One draw of the latents, the same whenever `key` is cached again."""
    generator = torch.Generator().manual_seed(int(key[:15], 16))
    return mean + std * torch.randn(mean.shape, generator=generator).to(mean)


def _latent_bytes(size: Size) -> int:
    """Of one float32 for each latent of a picture."""
    return 4 * (size[0] // 8) * (size[1] // 8)


def _require_finite(tensor: Tensor, name: str) -> None:
    require(
        bool(torch.isfinite(tensor).all()),
        f"The encoder gave infinite or invalid numbers for {name}. Start ComfyUI with --fp32-vae "
        "or --fp32-text-enc.",
    )
