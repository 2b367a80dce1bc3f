"""Which FLUX.1 is trained on, as far as its file tells, and which settings do not fit it.

Nothing is decided by it: what it finds is told. Sources: the model cards, SimpleTuner's quickstart
of FLUX, and `flux_fast_schedule`, `flux_attention_masked_training` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .config import JobSettings
from .data import TrainingData
from .load import BaseFlux
from .tensor_files import model_files, read_header

_SCHNELL_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the models with FLUX.1's network."""

    name: str
    words: tuple[str, ...] = ()
    """Of which one is in the name of its file, folder or repository, without signs between."""
    guidance: float | None = None
    """What it was trained with, where that is one value and another is a mistake."""
    is_fast: bool = False
    """Whether it draws in four steps, and a training takes that away unless it is assisted."""
    edits: bool = False
    """Whether it is shown a picture to edit."""
    masks_text: bool = False
    """Whether it was trained without seeing the padding of its texts."""
    needs_cfg: bool = False
    """Whether it was trained without distilled guidance, and draws with true guidance."""


VARIANTS = (
    Variant(name="LibreFLUX", words=("libreflux",), masks_text=True, needs_cfg=True),
    Variant(name="FLUX.1-schnell", words=("schnell",), is_fast=True),
    Variant(name="Fluxbooru", words=("fluxbooru",), guidance=3.5, needs_cfg=True),
    Variant(name="Flux-Dev2Pro", words=("dev2pro",), guidance=1.0),
    Variant(
        name="De-distilled FLUX.1",
        words=("dedistill", "undistill"),
        needs_cfg=True,
    ),
    Variant(name="FLUX.1-Kontext", words=("kontext",), edits=True),
    Variant(name="FLUX.1-Krea", words=("krea",)),
    Variant(name="FLUX.1-dev", words=("flux1dev", "fluxdev")),
)
UNKNOWN_WITH_GUIDANCE = Variant(name="a model of FLUX.1-dev's kind")
UNKNOWN_WITHOUT = Variant(name="a model of FLUX.1-schnell's kind", is_fast=True)


def variant_of(base: BaseFlux) -> Variant:
    """What the names around its file say, else what its tensors leave open."""
    text = "".join(sign for sign in " ".join(_names(base.path)).lower() if sign.isalnum())
    for variant in VARIANTS:
        if any(word in text for word in variant.words):
            return variant
    return UNKNOWN_WITH_GUIDANCE if base.config.guidance else UNKNOWN_WITHOUT


def _names(path: str) -> Iterator[str]:
    """Of the file, of its repository or its diffusers folder, and the title in its metadata."""
    if not path:
        return
    parts = Path(path).parts
    yield Path(path).stem
    yield from (part for part in parts if part.startswith("models--"))
    if Path(path).stem == "transformer":
        yield parts[-2]
    try:
        _, header = read_header(model_files(Path(path))[0], whole=False)
    except (OSError, ValueError):  # it may be gone: its weights are in memory
        return
    metadata = header.get("__metadata__", {})
    yield from (metadata.get(f"modelspec.{name}", "") for name in ("title", "architecture"))


def tell_variant(base: BaseFlux, job: JobSettings, data: TrainingData, cfg: float) -> list[str]:
    """Sentences for a user: which model it is, and what does not fit it.

    Args:
        cfg: true guidance of the sample pictures; 1 is none.
    """
    variant = variant_of(base)
    lines = [_found(variant)]
    lines += _about_fast(variant, base, job, data)
    lines += _about_guidance(variant, base, job, cfg)
    lines += _about_conditions(variant, data)
    return lines


def _found(variant: Variant) -> str:
    if variant is UNKNOWN_WITH_GUIDANCE:
        return (
            "The base model is of FLUX.1-dev's kind: its file does not say more, and Krea, Kontext "
            "and others have the same shapes."
        )
    if variant is UNKNOWN_WITHOUT:
        return (
            "The base model takes no guidance, and its file does not say more: it is taken for "
            "FLUX.1-schnell. LibreFLUX and some de-distilled models have the same shapes."
        )
    return f"The base model is {variant.name}, by the name of its file."


def _about_fast(
    variant: Variant, base: BaseFlux, job: JobSettings, data: TrainingData
) -> Iterator[str]:
    """What belongs to schnell alone."""
    timesteps = job.train.flow.timesteps.sampling
    if not variant.is_fast:
        if timesteps == "fast":
            yield "The timesteps are fast, the four steps of schnell, which this model is not."
        if base.assistant:
            yield (
                "The assistant computes along, though this model is not schnell: assistants are "
                "made for models that draw in four steps."
            )
        return
    if not base.assistant:
        yield (
            "Without an assistant the training takes the four steps from schnell along with what "
            "it learns: choose its training adapter as assistant, or train on FLUX.1-dev."
        )
    if timesteps not in ("fast", "custom"):
        yield (
            f"FLUX.1-schnell draws in four steps, and the timesteps are {timesteps}: set sampling "
            "of Schedule Settings to fast."
        )
    if data.prompts.length > _SCHNELL_LENGTH:
        yield (
            f"FLUX.1-schnell knows {_SCHNELL_LENGTH} T5 tokens, and the captions have "
            f"{data.prompts.length}: set length of Encode Prompts to {_SCHNELL_LENGTH}."
        )


def _about_guidance(
    variant: Variant, base: BaseFlux, job: JobSettings, cfg: float
) -> Iterator[str]:
    wanted = variant.guidance if base.config.guidance else None
    if wanted is not None and job.train.guidance != wanted:
        yield (
            f"{variant.name} was trained with a guidance of {wanted:g}, and it is "
            f"{job.train.guidance:g} here: set guidance to {wanted:g}."
        )
    if variant.name == "Flux-Dev2Pro":
        yield "Flux-Dev2Pro is only trained on: its LoRAs are used with FLUX.1-dev."
    if variant.needs_cfg and cfg == 1:
        yield (
            f"{variant.name} draws with true guidance: set cfg of Validation Settings, or of "
            "KSampler, to 2 to 5."
        )


def _about_conditions(variant: Variant, data: TrainingData) -> Iterator[str]:
    """References and masks of texts."""
    has_references = any(entry.references for entry in data.latents.entries)
    if variant.edits and not has_references:
        yield (
            "Kontext learns to edit from pairs, and these pictures have no references: set "
            "references of Image Folder Dataset. Without, it only learns to draw from text."
        )
    if has_references and not variant.edits:
        yield (
            "The pictures have references, which only Kontext knows: any other model first has to "
            "learn what they are."
        )
    if variant.masks_text and not data.prompts.has_masks:
        yield (
            f"{variant.name} was trained without seeing the padding of captions: turn mask_padding "
            "of Encode Prompts on."
        )
    if data.prompts.has_masks and not variant.masks_text:
        yield (
            "The padding of captions is hidden, which only LibreFLUX is used to: other FLUX.1 see "
            "all of it when they draw."
        )
