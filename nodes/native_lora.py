"""LoRAs on MODELs and CLIPs, ours and the core's, as patches that ComfyUI knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor

from ..trainers.block_weights import BlockWeights
from ..trainers.lora_names import comfy_names, is_text_encoder, split_name
from .lora_choice import ON_THE_WIRE
from .native import StorePatcher
from .native_fit import (
    Patches,
    require_known,
    require_most,
    require_no_bias,
    require_no_larger,
    require_one_spelling,
    require_widths,
)
from .native_ranges import WHOLE, SamplingRange, is_paged, ranged

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Add = Callable[[Patches, float], object]


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedLora:
    """What `apply_lora` did."""

    model: Any
    clip: Any
    num_layers: int
    """Layers of the MODEL that the LoRA changes."""
    num_text_layers: int
    """Layers of the CLIP that it changes."""
    unknown: tuple[str, ...]
    """Its layers that are in neither."""
    num_left: int
    """Its layers for text encoders where no CLIP was given."""
    idle_patterns: tuple[str, ...]
    """Block weights that match no layer which it changes."""
    reads_file_again: bool
    """Whether a range makes the host read the MODEL's file a second time."""


def add_lora(model: Any, tensors: dict[str, Tensor], strength: float) -> Any:
    """A clone of any MODEL with the LoRA on it. Raises ValueError as `apply_lora`."""
    return apply_lora(model, tensors, strength).model


def apply_lora(
    model: Any,
    tensors: dict[str, Tensor],
    strength: float,
    *,
    clip: Any = None,
    strength_clip: float = 1.0,
    block_weights: BlockWeights = BlockWeights(),  # noqa: B008
    span: SamplingRange = WHOLE,
) -> AppliedLora:
    """Clones of any MODEL, and of a CLIP if there is one, with the tensors of a LoRA as patches.

    Block weights and range are for the MODEL. A strength of 0 puts nothing on.

    Raises:
        ValueError: if half or more of the LoRA's layers are in neither, if it has other widths or
            biases of its own, or two tensors for one thing, if it makes a matrix of a quantized
            model larger, or if a pattern of the block weights matches no layer of the MODEL.
    """
    name = getattr(tensors, "name", "") or ON_THE_WIRE
    require_known(block_weights, model)
    found = _found(name, tensors, model, clip)
    require_no_bias(name, found.tensors)
    require_most(name, len({*found.of_model, *found.of_clip}), found.unknown)
    require_no_larger(name, found.patches, model)
    require_widths(name, found.patches, model.model)
    if clip is not None:
        require_widths(name, found.text_patches, clip.cond_stage_model)
    patched, add = ranged(model, span) if span != WHOLE else _whole(model)
    for weight, some in _by_weight(found.patches, block_weights).items():
        if strength * weight != 0:
            add(some, strength * weight)
    if found.text_patches and strength_clip != 0:
        clip = clip.clone()
        clip.add_patches(found.text_patches, strength_clip)
    return AppliedLora(
        model=patched,
        clip=clip,
        num_layers=len(found.of_model),
        num_text_layers=len(found.of_clip),
        unknown=found.unknown,
        num_left=len(found.left),
        idle_patterns=tuple(block_weights.matching_none(map(_key, found.patches))),
        reads_file_again=span != WHOLE and is_paged(model),
    )


def base_format(model: Any) -> str:
    """What the weights of a MODEL are kept in: a name of `formats.FORMATS`, fp16 or fp32."""
    if isinstance(model, StorePatcher):
        return model.model.atelier.format
    # Not the model's dtype, which for fp8 files with factors is the one that computes.
    num_weights = sum(one.numel() for one in model.model.diffusion_model.parameters())
    if model.model_size() < 1.5 * num_weights:
        return "fp8"
    return _FORMATS.get(model.model_dtype(), "bf16")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """What ComfyUI finds of a LoRA in a MODEL and a CLIP: patches, and names of layers."""

    tensors: dict[str, Tensor]
    """By names that ComfyUI reads."""
    patches: Patches
    text_patches: Patches
    of_model: tuple[str, ...]
    of_clip: tuple[str, ...]
    left: tuple[str, ...]
    """For text encoders, without a CLIP."""
    unknown: tuple[str, ...]


def _found(lora: str, tensors: dict[str, Tensor], model: Any, clip: Any) -> _Found:
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    text_names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if clip else {}
    require_one_spelling(lora, tensors, {**names, **text_names})
    tensors = comfy.lora_convert.convert_lora(comfy_names(tensors, names.keys() | text_names))
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    text_patches = comfy.lora.load_lora(tensors, text_names, log_missing=False)
    layers = dict.fromkeys(split_name(name)[0] for name in tensors)
    of_model = tuple(layer for layer in layers if _is_read(layer, names, patches))
    of_clip = tuple(layer for layer in layers if _is_read(layer, text_names, text_patches))
    left = tuple(layer for layer in layers if clip is None and is_text_encoder(layer))
    known = {*of_model, *of_clip, *left}
    return _Found(
        tensors=tensors,
        patches=patches,
        text_patches=text_patches,
        of_model=of_model,
        of_clip=of_clip,
        left=left,
        unknown=tuple(layer for layer in layers if layer not in known),
    )


def _is_read(layer: str, names: dict[str, Any], patches: Patches) -> bool:
    key = names.get(layer)
    has_bias = isinstance(key, str) and f"{key.removesuffix('.weight')}.bias" in patches
    return key in patches or has_bias


def _key(key: Any) -> str:
    """The name of a parameter, of which a patch may be for some rows only."""
    return key if isinstance(key, str) else key[0]


def _by_weight(patches: Patches, block_weights: BlockWeights) -> dict[float, Patches]:
    groups: dict[float, Patches] = defaultdict(dict)
    for key, patch in patches.items():
        groups[block_weights.of(_key(key))][key] = patch
    return groups


def _whole(model: Any) -> tuple[Any, Add]:
    patched = model.clone()
    return patched, patched.add_patches
