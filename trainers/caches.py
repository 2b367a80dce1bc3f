"""The two caches of a training job: latents of the pictures and embeddings of the captions.

They are descriptions, entries in order, whose tensors lie on disk under keys; `caching` fills them.
Latents are those of the model, shifted and scaled.

Shapes: C latent channels, h w latent size, L text tokens, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .config import require
from .shards import Shards


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


@dataclass(frozen=True, kw_only=True)
class LatentEntry:
    """One record of the dataset and the key of its latents."""

    record: str
    """`Record.id`."""
    key: str
    caption: str
    width: int
    """Pixels trained at; latents are an eighth of it."""
    height: int
    repeats: int = 1


@dataclass(frozen=True, kw_only=True)
class PromptEntry:
    text: str
    key: str


@dataclass(frozen=True, kw_only=True)
class LatentCache:
    """The latents of a dataset, in the order of its records."""

    folder: str
    """Absolute path."""
    encoder: str
    """Identity of the autoencoder and its scaling."""
    entries: tuple[LatentEntry, ...]

    def load(self, entry: LatentEntry, device: str | torch.device = "cpu") -> LatentDistribution:
        """Read one entry. Raises ValueError when its file is missing or damaged."""
        tensors = self._shards.read(entry.key)
        return LatentDistribution(
            mean=tensors["mean"].to(device, torch.float32),
            std=tensors["std"].to(device, torch.float32),
        )

    def fingerprint(self) -> str:
        """SHA-256 over everything here that training sees; the folder is not part of it."""
        return digest(sorted([e.key, e.caption, e.repeats] for e in self.entries))

    @property
    def total_bytes(self) -> int:
        """Size on disk."""
        return self._shards.num_bytes(entry.key for entry in self.entries)

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.folder)

    def to_json(self) -> dict[str, Any]:
        return _to_json("latents", self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LatentCache:
        """Raises ValueError when `values` are not a manifest of latents."""
        return cls(**_from_json("latents", values, LatentEntry))


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
        require(
            text in self._keys,
            f"The caption {text[:80]!r} is not in the prompt cache. Connect Encode Prompts to the "
            "same dataset as Cache Latents and queue again.",
        )
        tensors = self._shards.read(self._keys[text])
        return PromptEmbeds(
            prompt_embeds=tensors["prompt_embeds"].to(device), pooled=tensors["pooled"].to(device)
        )

    def fingerprint(self) -> str:
        """SHA-256 over everything here that training sees; the folder is not part of it."""
        return digest(sorted([entry.key, entry.text] for entry in self.entries))

    @property
    def total_bytes(self) -> int:
        """Size on disk."""
        return self._shards.num_bytes(entry.key for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        return _to_json("prompts", self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PromptCache:
        """Raises ValueError when `values` are not a manifest of prompts."""
        return cls(**_from_json("prompts", values, PromptEntry))

    @cached_property
    def _shards(self) -> Shards:
        return Shards(self.folder)

    @cached_property
    def _keys(self) -> dict[str, str]:
        return {entry.text: entry.key for entry in self.entries}


def digest(value: Any) -> str:
    """SHA-256 in hex of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _to_json(kind: str, cache: LatentCache | PromptCache) -> dict[str, Any]:
    return {"kind": kind, "version": 1, **dataclasses.asdict(cache)}


def _from_json(kind: str, values: dict[str, Any], entry_class: type) -> dict[str, Any]:
    try:
        fields = dict(values)
        if (fields.pop("kind"), fields.pop("version")) != (kind, 1):
            raise ValueError("another kind or version")
        return {**fields, "entries": tuple(entry_class(**entry) for entry in fields["entries"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"This is not a manifest of cached {kind}. Make it again with a current version."
        ) from error
