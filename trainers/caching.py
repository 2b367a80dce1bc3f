"""Filling the caches: only what is not on disk yet is encoded.

Every entry is keyed by what determines it (content, transform, encoder), never by its position: a
changed picture, caption or crop encodes just itself. Files hold exactly the dtype that the encoder
returned.

Shapes: B batch, C latent channels, H W pixels, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .buckets import Size
from .caches import LatentCache, LatentEntry, LatentSubset, PromptCache, PromptEntry, digest
from .checks import require
from .dataset import Dataset, Record, Subset, mask_weights, open_picture
from .files import require_room
from .filling import fill
from .flux import LATENT_CHANNELS
from .masks import Mask
from .pictures import Transform, transform
from .progress import OnProgress
from .references import Reference
from .scan import OnBadFile
from .shards import Shards

LATENTS = ("distribution", "one sample")
"""What is kept of a picture's latents: mean and deviation, so that every step draws a sample of its
own, or one such sample, in half the space. Of a reference a training takes the mean alone, so it
is kept in both."""

EncodePictures = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels [B, 3, H, W] in -1..1 to the mean and the deviation of the latents, each [B, C, h, w]
float32."""

EncodeTexts = Callable[[list[str]], tuple[Tensor, Tensor]]
"""B texts to prompt embeddings [B, L, D] and pooled embeddings [B, D2]."""

MaskTexts = Callable[[list[str]], Tensor]
"""B texts to [B, L] uint8, 1 for the tokens of each and 0 for its padding."""


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

    def facts(self, how: Transform, *, is_reference: bool = False) -> list[Any]:
        """What stands for this in a picture's key: nothing where it is the default."""
        is_tiled = 0 < self.tile < max(how.width, how.height)
        kept = "mean" if is_reference else self.kept
        return [kept] * self.is_sample + [{"tile": self.tile}] * is_tiled


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
    texts: Iterable[str],
    encoder_id: str,
    length: int,
    folder: str | Path,
    *,
    is_masked: bool = False,
) -> PromptCache:
    """What `cache_prompts` will return, computed without touching an encoder or the disk."""
    facts = {text: [text, length, encoder_id] for text in (*texts, "")}
    entries = tuple(
        PromptEntry(text=text, key=digest(of), mask=digest(["mask", *of]) if is_masked else "")
        for text, of in facts.items()
    )
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
    on_skip: Callable[[str], None] = lambda sentence: None,
) -> LatentCache:
    """Encode the pictures that are not in `folder` yet, `batch_size` of one size at a time.

    `encode` is not called when nothing is missing. Whatever stops the work, what is done stays.
    `on_skip` is told of each picture that its subset leaves out because it is bad.

    Raises:
        ValueError: what is missing would take more than `limit_bytes` or than the disk has, a
            picture or a mask changed or is bad, or the latents are not finite.
    """
    cache = latent_cache(dataset, encoder_id, folder, settings)
    wanted: dict[str, _Wanted] = {}
    masks: dict[str, _Wanted] = {}
    means: set[str] = set()
    for subset, cached in zip(dataset.subsets, cache.subsets, strict=True):
        for record, entry in zip(subset.records, cached.entries, strict=True):
            bad_file = subset.on_bad_file
            hows = [_Wanted(record, how, bad_file) for how in subset.transforms(record)]
            wanted |= zip(entry.keys, hows, strict=True)
            masks |= zip(entry.masks, hows, strict=False)
            if record.reference:
                hows = subset.reference_transforms(record)
                shown = [_Wanted(record.reference, how, bad_file) for how in hows]
                wanted |= zip(entry.references, shown, strict=True)
                means.update(entry.references)
    bad: dict[str, str] = {}

    def read(keys: list[str]) -> list[tuple[str, Tensor]]:
        return list(_readable(keys, wanted, lambda one: one.pixels(), bad))

    def encode_batch(batch: list[tuple[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if not batch:
            return
        mean, std = encode(torch.stack([pixels for _, pixels in batch]))
        for index, (key, _) in enumerate(batch):
            _require_finite(mean[index], f"the picture {wanted[key].picture.path}")
            if settings.is_sample:
                kept = mean[index] if key in means else _sample(mean[index], std[index], key)
                yield key, {"mean": kept}
            else:
                yield key, {"mean": mean[index], "std": std[index]}

    def weigh(keys: list[str]) -> list[tuple[str, dict[str, Tensor]]]:
        return [
            (key, {"mask": weights})
            for key, weights in _readable(keys, masks, lambda one: one.weights(), bad)
        ]

    shards = Shards(folder)
    sizes = {key: one.size for key, one in wanted.items()}
    mask_sizes = {key: one.size for key, one in masks.items()}
    num_floats = LATENT_CHANNELS * (1 if settings.is_sample else 2)
    require_room(
        shards.folder,
        sum(num_floats * _latent_bytes(sizes[key]) for key in shards.missing(sizes))
        + sum(_latent_bytes(mask_sizes[key]) for key in shards.missing(mask_sizes)),
        limit_bytes,
    )
    fill(shards, sizes, batch_size, read, encode_batch, on_progress)
    if masks:
        fill(shards, mask_sizes, 1, weigh, lambda made: made, on_progress)
    for sentence in dict.fromkeys(bad.values()):
        on_skip(f"Left out: {sentence}")
    return _without(cache, bad)


def cache_prompts(
    texts: Iterable[str],
    encode: EncodeTexts,
    encoder_id: str,
    length: int,
    folder: str | Path,
    *,
    mask: MaskTexts | None = None,
    batch_size: int = 1,
    limit_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> PromptCache:
    """Encode the texts, and the empty one, that are not in `folder` yet; with `mask` also which of
    their tokens are no padding, under keys of their own.

    `encode` is not called when nothing is missing. Whatever stops the work, what is done stays.
    How much a text takes, only its encoder knows: the first one tells it, before it is written.

    Raises:
        ValueError: what is missing would take more than `limit_bytes` or than the disk has, or the
            embeddings are not finite.
    """
    cache = prompt_cache(texts, encoder_id, length, folder, is_masked=mask is not None)
    texts_by_key = {entry.key: entry.text for entry in cache.entries}
    shards = Shards(folder)
    missing = shards.missing(texts_by_key)

    def encode_batch(keys: list[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        batch = [texts_by_key[key] for key in keys]
        embeds, pooled = encode(batch)
        if keys[0] == missing[0]:
            text_bytes = embeds[0].nbytes + pooled[0].nbytes
            require_room(shards.folder, len(missing) * text_bytes, limit_bytes)
        for index, (key, text) in enumerate(zip(keys, batch, strict=True)):
            _require_finite(embeds[index], f"the caption {text[:80]!r}")
            yield key, {"prompt_embeds": embeds[index], "pooled": pooled[index]}

    groups = dict.fromkeys(texts_by_key)  # all have one length, so any of them share a batch
    fill(shards, groups, batch_size, lambda keys: keys, encode_batch, on_progress)
    if mask is not None:
        _fill_masks(shards, cache, mask)
    return cache


def _fill_masks(shards: Shards, cache: PromptCache, mask: MaskTexts) -> None:
    texts_by_key = {entry.mask: entry.text for entry in cache.entries}

    def masked(keys: list[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for key, one in zip(keys, mask([texts_by_key[key] for key in keys]), strict=True):
            yield key, {"mask": one}

    groups = dict.fromkeys(texts_by_key)
    fill(shards, groups, len(groups), lambda keys: keys, masked, None)


@dataclass(frozen=True)
class _Wanted:
    """A picture at one size, and its mask."""

    picture: Record | Reference
    how: Transform
    on_bad_file: OnBadFile

    @property
    def size(self) -> Size:
        return self.how.width, self.how.height

    def pixels(self) -> Tensor:
        return transform(open_picture(self.picture), self.how)

    def weights(self) -> Tensor:
        assert isinstance(self.picture, Record)
        assert self.picture.mask is not None
        return mask_weights(self.picture.mask, self.how)


def _readable(
    keys: Iterable[str],
    wanted: Mapping[str, _Wanted],
    read: Callable[[_Wanted], Tensor],
    bad: dict[str, str],
) -> Iterator[tuple[str, Tensor]]:
    """What is read for each key; those that are to be skipped go into `bad` with the reason."""
    for key in keys:
        one = wanted[key]
        try:
            yield key, read(one)
        except ValueError as error:
            if one.on_bad_file == "stop":
                raise
            bad[key] = str(error)


def _without(cache: LatentCache, bad: Mapping[str, str]) -> LatentCache:
    """The cache without the entries that have one of the keys.

    Raises:
        ValueError: if nothing is left of a subset.
    """
    subsets = []
    for subset in cache.subsets:
        kept = tuple(e for e in subset.entries if bad.keys().isdisjoint(e.all_keys))
        require(bool(kept), next(iter(bad.values()), ""))
        subsets.append(dataclasses.replace(subset, entries=kept))
    return dataclasses.replace(cache, subsets=tuple(subsets))


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
    transforms, mask = subset.transforms(record), record.mask
    shown, reference = subset.reference_transforms(record), record.reference

    def key(content: str, how: Transform, *, is_reference: bool = False) -> str:
        kept = settings.facts(how, is_reference=is_reference)
        return digest([content, how.facts(), encoder_id, *kept])

    return LatentEntry(
        record=record.id,
        keys=tuple(key(record.content, how) for how in transforms),
        masks=tuple(_mask_key(mask, how) for how in transforms) if mask else (),
        references=tuple(key(reference.content, how, is_reference=True) for how in shown)
        if reference
        else (),
        reference_width=shown[0].width if shown else 0,
        reference_height=shown[0].height if shown else 0,
        texts=record.texts,
        dropout=subset.captions.dropout,
        is_regularization=subset.is_regularization,
        is_prior=subset.is_prior,
        width=transforms[0].width,
        height=transforms[0].height,
        repeats=record.repeats,
    )


def _mask_key(mask: Mask, how: Transform) -> str:
    return digest(["mask", mask.content, mask.is_alpha, how.facts()])


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
