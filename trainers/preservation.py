"""What keeps a model what it is: weights of masks and of class pictures, and class captions.

Class captions are differential output preservation: for the picture, noise and sigma of a sample
whose caption holds the trigger, the model with the LoRA learns to answer the same caption with the
class word as it does without the LoRA.

Shapes: B batch, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .caches import LatentEntry
from .checks import require
from .data import Sample, TrainingData
from .preservation_settings import PreservationSettings

_SMALLEST_MEAN = 1e-6
"""An all black mask keeps its weights of 0."""


class Part(NamedTuple):
    """A loss of a batch."""

    kind: str
    """subject, regularization, prior (pictures of the class) or class (captions of the class)."""
    loss: float
    weight: float
    """What its gradients are multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The means of a step."""

    loss: float
    """What is minimized: the parts times their weights."""
    parts: dict[str, float]
    """`regularization_loss`, `prior_loss` and `class_loss` where there were such, without their
    weights; each is the mean of the batches that had it."""
    kinds: frozenset[str]
    """Those of the parts (`Part.kind`)."""


def mean_losses(parts: Sequence[Part], num_batches: int) -> Losses:
    """Of all batches of a step."""
    kinds = dict.fromkeys(part.kind for part in parts if part.kind != "subject")
    values = {kind: [part.loss for part in parts if part.kind == kind] for kind in kinds}
    return Losses(
        loss=sum(part.weight * part.loss for part in parts) / num_batches,
        parts={f"{kind}_loss": sum(some) / len(some) for kind, some in values.items()},
        kinds=frozenset(part.kind for part in parts),
    )


def mask_weights(settings: PreservationSettings, weights_B1hw: Tensor | None) -> Tensor | None:
    """What the error of each latent counts, from the masks of a batch in 0..1."""
    if weights_B1hw is None:
        return None
    weights = weights_B1hw.clamp(min=settings.unmasked_weight)
    if settings.normalize_masks:
        weights = weights / weights.mean((1, 2, 3), keepdim=True).clamp(min=_SMALLEST_MEAN)
    return weights


def kind_and_weight(
    settings: PreservationSettings, entries: Sequence[LatentEntry]
) -> tuple[str, float]:
    """What all pictures of a batch are (`Part.kind`), and what their loss is multiplied by."""
    if entries[0].is_regularization:
        return "regularization", 1.0
    return ("prior", settings.prior_weight) if entries[0].is_prior else ("subject", 1.0)


class ClassCaptions(NamedTuple):
    """Of the samples of a batch."""

    texts: list[str]
    """With the class word where the caption holds the trigger, else as they are."""
    rows: Tensor
    """[B] 1 where it does, else 0."""


def class_captions(
    settings: PreservationSettings, samples: Sequence[Sample]
) -> ClassCaptions | None:
    """The captions with the class word; None if no caption of the samples holds the trigger."""
    found = [settings.class_caption(sample.text) for sample in samples]
    rows = torch.tensor([float(text is not None) for text in found])
    if not rows.any():
        return None
    own = (sample.text for sample in samples)
    return ClassCaptions([text or other for text, other in zip(found, own, strict=True)], rows)


def with_class_captions(settings: PreservationSettings, texts: Iterable[str]) -> tuple[str, ...]:
    """The texts, and those of them that hold the trigger once more with the class word."""
    texts = tuple(texts)
    classes = (text for text in map(settings.class_caption, texts) if text is not None)
    return tuple(dict.fromkeys([*texts, *classes]))


def require_class_captions(settings: PreservationSettings, data: TrainingData) -> None:
    """See that the captions with the class word are there.

    Raises:
        ValueError: no caption holds the trigger, or one with the class word was not encoded.
    """
    if not settings.keeps_class:
        return
    texts = {t for e in data.latents.entries for variants in e.texts for t in variants}
    classes = {text for text in map(settings.class_caption, texts) if text is not None}
    require(
        bool(classes),
        f"No caption holds the trigger {settings.trigger!r} of Preservation Settings, so there is "
        "nothing to put the class word for. Write it as the captions do, or as the trigger of the "
        "dataset.",
    )
    missing = sorted(classes - {entry.text for entry in data.prompts.entries})
    require(
        not missing,
        f"The class caption {''.join(missing[:1])[:80]!r} is not encoded. Connect Preservation "
        "Settings to Encode Prompts too, and queue again.",
    )
    data.prompts.require(classes)


def without_effect(settings: PreservationSettings, data: TrainingData) -> list[str]:
    """A sentence for every setting that was changed and does nothing with this data."""
    default, entries = PreservationSettings(), data.latents.entries
    lines = []
    if not any(entry.masks for entry in entries):
        lines += [
            f"The setting {name} has no effect: no picture has a mask."
            for name in ("unmasked_weight", "normalize_masks")
            if getattr(settings, name) != getattr(default, name)
        ]
    elif settings.unmasked_weight == 1:
        lines.append("The masks have no effect: an unmasked_weight of 1 counts all parts alike.")
    if settings.prior_weight != default.prior_weight and not any(e.is_prior for e in entries):
        lines.append(
            "The setting prior_weight has no effect: no dataset is of class pictures. Turn "
            "is_prior of Schedule Dataset on for one."
        )
    if settings.class_weight != default.class_weight and not settings.keeps_class:
        lines.append("The setting class_weight has no effect: there is no trigger.")
    return lines
