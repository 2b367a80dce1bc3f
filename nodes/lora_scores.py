"""What Score LoRA measures: the loss, the picture–text score, the likeness to training pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..trainers.captions import listed
from ..trainers.checks import require
from ..trainers.data import TrainingData
from ..trainers.dataset import Dataset
from ..trainers.evaluate import Conditions, Predict, held_out_loss
from ..trainers.flux import LATENT_CHANNELS, attention_mask
from ..trainers.likeness import (
    NEARLY_THE_SAME,
    most_alike,
    nearest,
    thumbnail,
    trained_pictures,
)
from ..trainers.prompt_list import prompts_of_pictures
from . import host
from .native import to_training_device
from .native_lora import add_lora
from .score import picture_text_scores
from .trainable import model_to_train, without_patches


@dataclass
class Findings:
    """What was measured, in sentences and in numbers."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def is_asked(
        self,
        inputs: dict[str, Any],
        own: tuple[str, ...],
        shared: tuple[str, ...],
        left_out: Callable[[str], str],
    ) -> bool:
        """Whether all inputs of a measure are there. If some of its `own` are, it was meant, and
        what lacks is told."""
        missing = [name for name in (*own, *shared) if name not in inputs]
        if missing and any(name in inputs for name in own):
            self.warnings.append(left_out(", ".join(missing)))
        return not missing


def measure_loss(
    findings: Findings,
    model: Any,
    data: TrainingData,
    tensors: dict[str, Tensor],
    *,
    strength: float,
    guidance: float,
) -> None:
    """The loss with the LoRA and without, with the samples' texts and with the empty one.

    Raises:
        ValueError: if something belongs to another model or is not there.
    """
    data.check_fits(model_to_train(without_patches(model)).base.config)
    models = {"base": model, "lora": add_lora(model, tensors, strength)}
    kinds = {"loss": True}
    if any(entry.text == "" for entry in data.prompts.entries):
        kinds["loss_empty_caption"] = False
    passes = len(models) * len(kinds) * len(data.latents.entries)
    progress, done = host.Progress(passes), iter(range(passes))
    for name, patched in models.items():
        predict = _predict_by(patched, data, guidance)
        for kind, with_text in kinds.items():
            findings.values.setdefault(kind, {})[name] = held_out_loss(
                predict,
                data,
                device=model.load_device,
                with_text=with_text,
                check_stop=lambda: progress.update(next(done), passes),
            )
    count = len(data.latents.entries)
    for kind in kinds:
        base, lora = findings.values[kind]["base"], findings.values[kind]["lora"]
        change = f"{lora / base - 1:+.1%}"
        findings.lines.append(
            f"Loss of {count} samples: {base:.4f} without the LoRA, {lora:.4f} with it ({change})."
            if kind == "loss"
            else f"With the empty caption: {base:.4f} without the LoRA, {lora:.4f} with it "
            f"({change})."
        )


def _predict_by(model: Any, data: TrainingData, guidance: float) -> Predict:
    """What ComfyUI's network predicts, with whatever LoRAs the MODEL carries."""
    width, height = max((e.width, e.height) for e in data.latents.entries)
    to_training_device(model, model.memory_required([1, LATENT_CHANNELS, height // 8, width // 8]))
    options = model.model_options.get("transformer_options", {})

    def predict(latents: Tensor, sigma: Tensor, given: Conditions) -> Tensor:
        with torch.inference_mode():
            without_noise = model.model.apply_model(
                latents,
                sigma,
                c_crossattn=given.prompt_embeds,
                y=given.pooled,
                guidance=sigma.new_full(sigma.shape, guidance),
                transformer_options=dict(options),
                **_further(given, latents),
            )
        return (latents - without_noise.to(latents.device)) / sigma[:, None, None, None]

    return predict


def _further(given: Conditions, latents: Tensor) -> dict[str, Any]:
    """The reference and the mask as ComfyUI's FLUX takes them, where there are any."""
    found: dict[str, Any] = {}
    if given.reference is not None:
        found["ref_latents"] = [given.reference]
    if given.text_mask is not None:
        tokens = latents[0, 0].numel() // 4
        if given.reference is not None:
            tokens += given.reference[0, 0].numel() // 4
        # As a bias: ComfyUI makes numbers of all that it is given.
        found["attention_mask"] = attention_mask(given.text_mask, tokens)[:, 0].float().log()
    return found


def measure_fit(
    findings: Findings, images: Tensor, texts: str, clip: Any, clip_vision: Any
) -> None:
    """How well pictures [N, H, W, 3] fit their texts, a line for each or one for all.

    Raises:
        ValueError: if there are others than that, or the models do not belong together.
    """
    prompts = prompts_of_pictures(texts, len(images))
    scores = picture_text_scores(clip_vision, clip, images, prompts)
    mean = sum(scores) / len(scores)
    findings.values["score"] = {"mean": mean, "pictures": scores}
    findings.lines.append(
        f"Picture–text score of {len(scores)} pictures: {mean:.1f}, from {min(scores):.1f} to "
        f"{max(scores):.1f}."
    )


def measure_likeness(
    findings: Findings, images: Tensor, dataset: Dataset, clip_vision: Any = None
) -> None:
    """How like pictures [N, H, W, 3] are to training pictures, by pixels and, with a CLIP vision
    model, by its embeddings.

    Raises:
        ValueError: if there are no training pictures, or one cannot be read.
    """

    def describe(pixels: Tensor) -> dict[str, Tensor]:
        host.check_interrupted()
        found = {"pixels": thumbnail(pixels)}
        if clip_vision is not None:
            found["CLIP vision"] = clip_vision.encode_image(pixels[None])["image_embeds"][0].cpu()
        return found

    drawn = [describe(image) for image in images[..., :3]]
    names, trained, mirrored = [], [], []
    for name, pixels in trained_pictures(dataset):
        names.append(name)
        trained.append(describe(pixels))
        mirrored.append({"pixels": thumbnail(pixels.flip(1))})
    require(bool(names), "The dataset of Score LoRA has no pictures that are learned.")
    for kind in drawn[0]:
        own = torch.stack([one[kind] for one in trained])
        turned = [one[kind] for one in mirrored if kind in one]
        both = torch.cat([own, torch.stack(turned)]) if turned else own
        found = [
            (one.likeness, names[one.index % len(names)])
            for one in nearest(torch.stack([one[kind] for one in drawn]), both)
        ]
        _tell_likeness(findings, kind, found, most_alike(own))


def _tell_likeness(
    findings: Findings, by: str, found: list[tuple[float, str]], among: float | None
) -> None:
    """Say how like each picture is to a training picture, `(likeness, name)`; which is a copy."""
    largest, name = max(found)
    findings.values[f"likeness by {by}"] = {
        "pictures": [{"nearest": name, "likeness": value} for value, name in found],
        "among_training_pictures": among,
    }
    findings.lines.append(
        f"Likeness by {by}, where 1 is the same: at most {largest:.2f}, to '{name}'."
    )
    if among is not None:
        findings.lines.append(f"Training pictures among themselves by {by}: at most {among:.2f}.")
    copies = [
        f"{number} ('{name}', {value:.2f})"
        for number, (value, name) in enumerate(found, start=1)
        if value >= NEARLY_THE_SAME
    ]
    if copies:
        findings.warnings.append(
            f"Nearly training pictures by {by}: {listed(copies)}. The LoRA may have learned them "
            "by heart: take an earlier checkpoint, a lower strength or rank, or train with more "
            "pictures."
        )
