"""What Apply LoRA and the LoRA Mixer say of a LoRA: what it does here, and what to know of it."""

from __future__ import annotations

from ..trainers.lora_file import LoraFacts
from .native_fit import some_of
from .native_lora import AppliedLora

_NOT_PACKED = {"bf16", "fp16", "fp32"}


def said_of(
    name: str, applied: AppliedLora, facts: LoraFacts, strength: float, strength_clip: float
) -> list[str]:
    """Sentences on what was put on, and how the LoRA was trained, as far as its file says."""
    said = []
    if applied.num_layers:
        said.append(f"{name} is on the MODEL: strength {strength:g}, layers: {applied.num_layers}.")
    if applied.num_text_layers:
        said.append(
            f"{name} is on the CLIP: strength {strength_clip:g}, layers: {applied.num_text_layers}."
        )
    if facts.trigger_words:
        said.append(f"Trigger words of {name}: {', '.join(facts.trigger_words)}.")
    if facts.rank is not None and not facts.has_alphas:
        said.append(f"{name} has rank {facts.rank} and no alpha, so its scale is 1.")
    elif facts.rank is not None and facts.alpha is not None:
        said.append(f"{name} has rank {facts.rank} and alpha {facts.alpha:g}.")
    if facts.steps is not None:
        said.append(f"{name} was trained for {facts.steps} steps.")
    if facts.base_name:
        said.append(f"{name} was trained on {facts.base_name}.")
    return said


def warned_of(
    name: str, applied: AppliedLora, facts: LoraFacts, strength: float, model_format: str
) -> list[str]:
    """Sentences on what may be other than it looks."""
    warnings = []
    if strength == 0:
        warnings.append(f"{name} has a strength of 0, so the MODEL stays as it is.")
    if applied.unknown:
        warnings.append(
            f"Layers of {name} that are not in this MODEL, and were left out: "
            f"{len(applied.unknown)} ({some_of(applied.unknown)})."
        )
    if applied.num_left:
        warnings.append(
            f"Layers of {name} for text encoders, which were left out: {applied.num_left}. Connect "
            "the CLIP to the clip input."
        )
    warnings += [
        f"The block weight '{pattern}' matches no layer that {name} changes."
        for pattern in applied.idle_patterns
    ]
    if facts.base_format and _kind(facts.base_format) != _kind(model_format):
        warnings.append(
            f"{name} was trained on a base in {facts.base_format}, and this MODEL is in "
            f"{model_format}, so pictures will differ a little from those of the training."
        )
    if facts.guidance is not None and facts.guidance > 1:
        warnings.append(
            f"{name} was trained with a guidance of {facts.guidance:g}, which takes back some of "
            "the model's distillation: if pictures are weak, use a cfg above 1, with Dynamic "
            "Threshold CFG."
        )
    if applied.reads_file_again:
        warnings.append(
            "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), which LoRAs for a "
            "part of the sampling cannot have, so its file is read a second time."
        )
    return warnings


def _kind(format: str) -> str:
    return "bf16" if format in _NOT_PACKED else format
