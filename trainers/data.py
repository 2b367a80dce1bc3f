"""What a training reads: the two caches, and how a batch of them becomes tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .caches import LatentCache, LatentEntry, PromptCache
from .caption_variants import choose_text
from .flux import LATENT_CHANNELS, FluxConfig, require_trainable


class Sample(NamedTuple):
    """What one place of a batch trains."""

    key: str
    """Of the latents."""
    text: str
    mask: str = ""
    """Key of the weights of the latents; empty where all of them count."""
    reference: str = ""
    """Key of what a Kontext sees beside them; empty for nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """The tensors of some samples.

    Shapes: B batch, C latent channels, h w latent size, L text tokens, D width.
    """

    latents: Tensor
    """[B, C, h, w] float32, drawn from their distributions."""
    prompt_embeds: Tensor
    """[B, L, D] of T5."""
    pooled: Tensor
    """[B, D2] of CLIP."""
    weights: Tensor | None
    """[B, 1, h, w] in 0..1 by which the error of each latent counts, or None if no sample has a
    mask."""
    text_mask: Tensor | None = None
    """[B, L], 0 for padding that the network does not see, or None if it sees all."""
    reference: Tensor | None = None
    """[B, C, h2, w2] of what a Kontext sees beside the noise: the means, as ComfyUI's VAE gives."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The two caches, paired by record, and how a batch of them becomes tensors."""

    latents: LatentCache
    prompts: PromptCache

    def check_fits(self, config: FluxConfig) -> None:
        """See that all is there and fits the model, reading one entry of each kind.

        Raises:
            ValueError: if something is not there or was not encoded, an encoder belongs to another
                model, or LoRAs are not trained on this kind of model.
        """
        require_trainable(config)
        entries = self.latents.entries
        texts = {text for entry in entries for variants in entry.texts for text in variants}
        self.prompts.require(texts | {""} if any(e.dropout for e in entries) else texts)
        self.latents.require_complete()
        embeds = self.prompts.load(entries[0].texts[0][0])
        widths = (embeds.prompt_embeds.shape[-1], embeds.pooled.shape[-1])
        if widths != (config.context_dim, config.vector_dim):
            raise ValueError(
                f"The prompts come from text encoders of widths {widths[0]} and {widths[1]}; this "
                f"model needs {config.context_dim} and {config.vector_dim}. Connect the CLIP that "
                "belongs to the model to Encode Prompts."
            )
        channels = self.latents.load(self.latents.keys[0]).mean.shape[0]
        if channels != LATENT_CHANNELS:
            raise ValueError(
                f"The latents have {channels} channels; FLUX needs {LATENT_CHANNELS}. Connect "
                "FLUX's VAE to Cache Latents."
            )

    def choose(self, entries: list[LatentEntry], generator: torch.Generator) -> list[Sample]:
        """Of each entry one of its texts, and the picture or its mirror image."""
        texts = [choose_text(entry.texts, entry.dropout, generator) for entry in entries]
        places = torch.rand(len(entries), generator=generator).tolist()
        samples = []
        for entry, text, place in zip(entries, texts, places, strict=True):
            index = int(place * len(entry.keys))
            mask = entry.masks[index] if entry.masks else ""
            reference = entry.references[index] if entry.references else ""
            samples.append(Sample(entry.keys[index], text, mask, reference))
        return samples

    def load(
        self, samples: list[Sample], device: torch.device, generator: torch.Generator
    ) -> TrainingBatch:
        """Read what was chosen, and draw the latents."""
        pictures = [self.latents.load(sample.key) for sample in samples]
        mean = torch.stack([picture.mean for picture in pictures])
        std = torch.stack([picture.std for picture in pictures])
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        return TrainingBatch(
            latents=latents.to(device),
            weights=self._weights(samples, latents, device),
            reference=_stacked([self.reference(sample.reference) for sample in samples], device),
            **self._texts([sample.text for sample in samples], device),
        )

    def with_texts(self, batch: TrainingBatch, texts: Sequence[str]) -> TrainingBatch:
        """The same pictures with other texts, one for each."""
        return dataclasses.replace(batch, **self._texts(texts, batch.latents.device))

    def reference(self, key: str) -> Tensor | None:
        """The latents [C, h2, w2] under the key of a reference, None for no key."""
        return self.latents.load(key).mean if key else None

    def _texts(self, texts: Sequence[str], device: torch.device) -> dict[str, Any]:
        """What a batch has of its texts."""
        loaded = [self.prompts.load(text) for text in texts]
        return {
            "prompt_embeds": _stacked([text.prompt_embeds for text in loaded], device),
            "pooled": _stacked([text.pooled for text in loaded], device),
            "text_mask": _stacked([text.mask for text in loaded], device),
        }

    def _weights(
        self, samples: list[Sample], latents: Tensor, device: torch.device
    ) -> Tensor | None:
        if not any(sample.mask for sample in samples):
            return None
        seen = torch.ones(latents.shape[-2:])
        masks = [self.latents.load_mask(s.mask) if s.mask else seen for s in samples]
        return torch.stack(masks)[:, None].to(device)


def _stacked(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Those of a batch, which all have one or none has."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present).to(device) if present else None
