"""What a training reads: the two caches, and how a batch of them becomes tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .caches import LatentCache, LatentEntry, PromptCache
from .captions import choose_text
from .flux import LATENT_CHANNELS, FluxConfig, require_trainable


class Sample(NamedTuple):
    """What one place of a batch trains."""

    key: str
    """Of the latents."""
    text: str


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
        keys = [e.keys[int(place * len(e.keys))] for e, place in zip(entries, places, strict=True)]
        return [Sample(key, text) for key, text in zip(keys, texts, strict=True)]

    def load(self, samples: list[Sample], device: torch.device, generator: torch.Generator):
        """Latents [B, C, H, W] drawn from their distributions, prompt embeddings, pooled ones."""
        pictures = [self.latents.load(sample.key) for sample in samples]
        texts = [self.prompts.load(sample.text) for sample in samples]
        mean = torch.stack([picture.mean for picture in pictures])
        std = torch.stack([picture.std for picture in pictures])
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        prompt_embeds = torch.stack([text.prompt_embeds for text in texts])
        pooled = torch.stack([text.pooled for text in texts])
        return latents.to(device), prompt_embeds.to(device), pooled.to(device)
