"""The two caches of a training job: latents of the pictures and embeddings of the captions.

They are descriptions, entries in order, whose tensors lie on disk under keys; `caching` fills them.
Latents are those of the model, shifted and scaled.

Shapes: C latent channels, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .checks import require
from .config import ALWAYS, Schedule
from .shards import Shards

_VERSION = 3
"""Of a manifest. 3: subsets."""


@dataclass(frozen=True)
class LatentDistribution:
    """Mean and standard deviation of one picture's latents, each [C, h, w] float32."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class PromptEmbeds:
    """One text: `prompt_embeds` [L, D] of T5 and `pooled` [D2] of CLIP."""

    prompt_embeds: Tensor
    pooled: Tensor
    mask: Tensor | None = None
    """[L], 1 for the tokens of the text and 0 for padding, if the cache has it."""


@dataclass(frozen=True, kw_only=True)
class LatentEntry:
    """One record of the dataset and the key of its latents."""

    record: str
    """`Record.id`."""
    keys: tuple[str, ...]
    """Of its latents, and of those of the mirrored picture if it is trained too."""
    masks: tuple[str, ...] = ()
    """Keys of the weights of those latents; without, all of the picture counts."""
    references: tuple[str, ...] = ()
    """Keys of what a Kontext sees beside the noise of those latents."""
    reference_width: int = 0
    """Pixels of the references."""
    reference_height: int = 0
    texts: tuple[tuple[str, ...], ...]
    """The captions of the record, and the variants of each."""
    width: int
    """Pixels trained at; latents are an eighth of it."""
    height: int
    repeats: int = 1
    dropout: float = 0.0
    """Share of its samples, 0 to 1, that train with the empty text."""
    is_regularization: bool = False
    """Whether it trains towards what the model draws without the LoRA. All of a subset do."""
    is_prior: bool = False
    """Whether it is a picture of the class, whose loss has a weight of its own. As above."""

    @property
    def name(self) -> str:
        """What tells one entry from another wherever the files lie."""
        return self.keys[0]

    @property
    def all_keys(self) -> tuple[str, ...]:
        return *self.keys, *self.masks, *self.references

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Pixels of the picture and of its reference; those of one batch are alike."""
        return self.width, self.height, self.reference_width, self.reference_height

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatentEntry:
        texts = tuple(tuple(variants) for variants in values["texts"])
        return cls(
            **{
                **values,
                "keys": tuple(values["keys"]),
                "masks": tuple(values["masks"]),
                "references": tuple(values.get("references", ())),
                "texts": texts,
            }
        )


@dataclass(frozen=True, kw_only=True)
class LatentSubset:
    """The entries of one subset of the dataset. Batches never mix two of them."""

    name: str
    entries: tuple[LatentEntry, ...]
    schedule: Schedule = ALWAYS

    def fingerprint(self) -> str:
        """SHA-256 over everything here that training sees, the name aside."""
        entries = sorted(
            [*e.keys, *e.masks, *e.texts, e.repeats, e.dropout, e.is_regularization]
            # Caches from before there were any stay the same.
            + ["prior"] * e.is_prior
            + [*e.references]
            for e in self.entries
        )
        return digest([entries, dataclasses.astuple(self.schedule)])

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatentSubset:
        entries = tuple(LatentEntry.from_json(entry) for entry in values["entries"])
        return cls(**{**values, "entries": entries, "schedule": Schedule(**values["schedule"])})


@dataclass(frozen=True, kw_only=True)
class PromptEntry:
    text: str
    key: str
    mask: str = ""
    """Key of which of its tokens are no padding; empty where that is not asked for."""

    @property
    def all_keys(self) -> tuple[str, ...]:
        return (self.key, self.mask) if self.mask else (self.key,)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PromptEntry:
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """The latents of a dataset, in the order of its subsets and their records.

    Raises:
        ValueError: if only some subsets have a probability, or none starts at the first step.
    """

    folder: str
    """Absolute path."""
    encoder: str
    """Identity of the autoencoder and its scaling."""
    subsets: tuple[LatentSubset, ...]

    def __post_init__(self) -> None:
        drawn = [subset.name for subset in self.subsets if subset.schedule.probability]
        always = [subset.name for subset in self.subsets if not subset.schedule.probability]
        require(
            not drawn or not always,
            f"The dataset {''.join(always[:1])!r} has no probability and others have one. Give "
            "each one a probability, or none.",
        )
        require(
            not all(subset.schedule.start_step for subset in self.subsets),
            "No dataset starts at step 0, so there would be nothing to train at first. Set the "
            "start step of one of them to 0.",
        )

    @property
    def entries(self) -> tuple[LatentEntry, ...]:
        """Of all subsets, in order."""
        return tuple(entry for subset in self.subsets for entry in subset.entries)

    def load(self, key: str, device: str | torch.device = "cpu") -> LatentDistribution:
        """Read one of an entry's keys. Raises ValueError when it is missing or damaged."""
        tensors = self._shards.read(key)
        mean = tensors["mean"].to(device, torch.float32)
        # Where only one sample was kept, it is all that can be drawn.
        std = tensors["std"].to(mean) if "std" in tensors else torch.zeros_like(mean)
        return LatentDistribution(mean=mean, std=std)

    def load_mask(self, key: str) -> Tensor:
        """Weights [h, w] of latents, float32 in 0..1, under one of an entry's masks.

        Raises:
            ValueError: it is missing or damaged.
        """
        return self._shards.read(key)["mask"]

    def require_complete(self) -> None:
        """Raises ValueError if an entry is not on disk; contents are not read."""
        self._shards.require(self.keys)

    def fingerprint(self) -> str:
        """SHA-256 over everything here that training sees; the folder is not part of it."""
        return digest([subset.fingerprint() for subset in self.subsets])

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key, in the order of the entries."""
        return tuple(key for entry in self.entries for key in entry.all_keys)

    @property
    def total_bytes(self) -> int:
        """Size on disk."""
        return self._shards.num_bytes(self.keys)

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.folder)

    def to_json(self) -> dict[str, Any]:
        return _to_json("latents", self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatentCache:
        """Raises ValueError when `values` are not a manifest of latents."""
        return cls(**_from_json("latents", values, "subsets", LatentSubset))


@dataclass(frozen=True, kw_only=True)
class PromptCache:
    """The embeddings of every distinct text of a dataset, and of the empty text."""

    folder: str
    """Absolute path."""
    encoder: str
    """Identity of the two text encoders."""
    length: int
    """T5 tokens of each text."""
    entries: tuple[PromptEntry, ...]

    def load(self, text: str, device: str | torch.device = "cpu") -> PromptEmbeds:
        """Read one text, in the dtype on disk.

        Raises:
            ValueError: the text was not encoded, or its file is missing or damaged.
        """
        entry = self._entry(text)
        tensors = self._shards.read(entry.key)
        mask = self._shards.read(entry.mask)["mask"].to(device) if entry.mask else None
        return PromptEmbeds(
            prompt_embeds=tensors["prompt_embeds"].to(device),
            pooled=tensors["pooled"].to(device),
            mask=mask,
        )

    def require(self, texts: Iterable[str]) -> None:
        """Raises ValueError if a text was not encoded or is not on disk; contents are not read."""
        self._shards.require(key for text in texts for key in self._entry(text).all_keys)

    @property
    def has_masks(self) -> bool:
        """Whether padding is hidden from the rest of the network."""
        return any(entry.mask for entry in self.entries)

    def fingerprint(self) -> str:
        """SHA-256 over everything here that training sees; the folder is not part of it."""
        return digest(sorted([e.key, e.text, *([e.mask] if e.mask else [])] for e in self.entries))

    @property
    def total_bytes(self) -> int:
        """Size on disk."""
        return self._shards.num_bytes(self.keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key, in the order of the entries."""
        return tuple(key for entry in self.entries for key in entry.all_keys)

    def to_json(self) -> dict[str, Any]:
        return _to_json("prompts", self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PromptCache:
        """Raises ValueError when `values` are not a manifest of prompts."""
        return cls(**_from_json("prompts", values, "entries", PromptEntry))

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.folder)

    def _entry(self, text: str) -> PromptEntry:
        require(
            text in self._by_text,
            f"The caption {text[:80]!r} is not in the prompt cache. Connect Encode Prompts to the "
            "same dataset as Cache Latents and queue again.",
        )
        return self._by_text[text]

    @cached_property
    def _by_text(self) -> dict[str, PromptEntry]:
        return {entry.text: entry for entry in self.entries}


def digest(value: Any) -> str:
    """SHA-256 in hex of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _to_json(kind: str, cache: LatentCache | PromptCache) -> dict[str, Any]:
    return {"kind": kind, "version": _VERSION, **dataclasses.asdict(cache)}


def _from_json(
    kind: str, values: dict[str, Any], name: str, item: type[LatentSubset | PromptEntry]
) -> dict[str, Any]:
    try:
        fields = dict(values)
        if (fields.pop("kind"), fields.pop("version")) != (kind, _VERSION):
            raise ValueError("another kind or version")
        return {**fields, name: tuple(item.from_json(one) for one in fields[name])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"This is not a manifest of cached {kind}. Make it again with a current version."
        ) from error
