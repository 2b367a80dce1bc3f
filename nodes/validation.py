"""What a training is looked at with: sample pictures, held out samples, a picture–text score."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..trainers.data import TrainingData
from ..trainers.load import BaseFlux
from ..trainers.rhythm import Rhythm
from .encoders import require_flux_vae, vae_identity
from .score import require_one_space, score_identity


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as ComfyUI's samplers take it."""

    name: str
    text: str
    positive: Any
    """CONDITIONING of the prompt."""
    negative: Any
    """CONDITIONING of the negative prompt; only computed if the CFG is not 1."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How pictures are drawn, in the words of KSampler."""

    steps: int = 20
    seed: int = 0
    name: str = "euler"
    scheduler: str = "simple"
    cfg: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One sample picture that is drawn again and again."""

    prompt: EncodedPrompt
    width: int
    height: int
    key: str
    """Hash of what determines it, the weights of the LoRA aside."""

    def path(self, folder: Path, step: int) -> Path:
        return folder / f"step-{step:06d}-{self.key}.png"


@dataclass(frozen=True, kw_only=True)
class Score:
    """ComfyUI's CLIP_VISION and CLIP objects of one CLIP model."""

    vision: Any
    text: Any


@dataclass(frozen=True, kw_only=True)
class Validation:
    """When and with what a training is looked at. Nothing of it changes what is trained."""

    rhythm: Rhythm
    vae: Any = None
    prompts: tuple[EncodedPrompt, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    """Width and height in pixels of the pictures of each prompt; () for those that are trained."""
    sampler: Sampler = Sampler()
    held_out: TrainingData | None = None
    score: Score | None = None
    attention: str = ""
    """The backend that was chosen for the MODEL that draws; empty where none was."""

    @property
    def draws(self) -> bool:
        return bool(self.prompts)

    @property
    def shows_padding(self) -> bool:
        """Whether the model sees the padding of any prompt that is drawn."""
        return any(
            "attention_mask" not in options
            for prompt in self.prompts
            for _, options in prompt.positive
        )

    def check_fits(self, base: BaseFlux) -> None:
        """Raises ValueError if something belongs to another model."""
        if self.held_out is not None:
            self.held_out.check_fits(base.config)
        if self.score is not None:
            require_one_space(self.score.vision, self.score.text)
        if not self.draws:
            return
        require_flux_vae(self.vae)
        width, needed = self.prompts[0].positive[0][0].shape[-1], base.config.context_dim
        if width != needed:
            raise ValueError(
                f"The prompts of the sample pictures have a width of {width}, and this model needs "
                f"{needed}. Encode them with the CLIP that belongs to the model."
            )

    def score_key(self, default_size: tuple[int, int]) -> str:
        """Hash of what is scored and of the model that does: two scores of one key can be compared.
        Empty without a score."""
        if self.score is None:
            return ""
        keys = sorted({picture.key for picture in self.pictures(default_size)})
        model = score_identity(self.score.vision, self.score.text)
        return hashlib.sha256(f"{keys} {model}".encode()).hexdigest()[:8]

    def pictures(self, default_size: tuple[int, int]) -> Iterator[Picture]:
        """All pictures of one look, in the order in which they are shown."""
        vae = vae_identity(self.vae) if self.draws else ""
        for prompt in self.prompts:
            for width, height in self.sizes or (default_size,):
                key = self._key(prompt, width, height, vae)
                yield Picture(prompt=prompt, width=width, height=height, key=key)

    def _key(self, prompt: EncodedPrompt, width: int, height: int, vae: str) -> str:
        facts = [f"{width} {height} {self.sampler} {vae}", *filter(None, [self.attention])]
        digest = hashlib.sha256(" ".join(facts).encode())
        for embeds, options in [*prompt.positive, *prompt.negative]:
            added = (options.get("pooled_output"), options.get("attention_mask"))
            tensors = [embeds, *added, *options.get("reference_latents", [])]
            for tensor in tensors:
                digest.update(_bytes(tensor))
            digest.update(repr(options.get("guidance")).encode())
        return digest.hexdigest()[:8]


def _bytes(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.float().cpu().numpy().tobytes()
