"""LoRAs on MODELs and CLIPs, ours and the core's, as patches that ComfyUI knows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..trainers.block_weights import BlockWeights
from ..trainers.lora_names import comfy_names, is_text_encoder, read_module, split_name
from .linear import enlarges
from .lora_choice import ON_THE_WIRE
from .native import StorePatcher
from .native_ranges import WHOLE, SamplingRange, is_paged, ranged

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Patches = dict[Any, Any]
"""What `comfy.lora.load_lora` gives: by a key of the model, or by it with rows, an adapter."""
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
    _require_known(block_weights, model)
    found = _found(name, tensors, model, clip)
    _require_no_bias(name, found.tensors)
    _require_most(name, found)
    _require_same_sizes(name, found, model, clip)
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
    return (
        "fp8"
        if model.model_size() < 1.5 * num_weights
        else _FORMATS.get(model.model_dtype(), "bf16")
    )


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
    _require_one_spelling(lora, tensors, {**names, **text_names})
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


def _require_known(block_weights: BlockWeights, model: Any) -> None:
    names = (name for name, _ in model.model.named_modules())
    for pattern in block_weights.matching_none(names) if block_weights.lines else ():
        raise ValueError(
            f"The block weight '{pattern}' matches no layer of this MODEL. Write a part of its "
            "names, such as 'double_blocks.0-9' or 'single_blocks', with * for any letters."
        )


def _require_one_spelling(lora: str, tensors: dict[str, Tensor], names: dict[str, Any]) -> None:
    """ComfyUI would take one of two tensors for the same thing, and leave the other out."""
    taken: dict[Any, str] = {}
    for name in tensors:
        module, _, part = split_name(name)
        target = names.get(read_module(module, names))
        other = taken.setdefault((target, part), name)
        if target is not None and other != name:
            raise ValueError(
                f"The LoRA '{lora}' has two tensors for the same matrix: '{other}' and '{name}'. "
                "Choose another file."
            )


def _require_no_bias(lora: str, tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if split_name(name)[2] == "bias":
            raise ValueError(
                f"The LoRA '{lora}' was trained with lora_bias of peft, which ComfyUI does not "
                f"compute: it has '{name}'. Choose a LoRA that was trained without."
            )


def _require_most(lora: str, found: _Found) -> None:
    unknown = found.unknown
    num_asked = len({*found.of_model, *found.of_clip}) + len(unknown)
    if not num_asked:
        raise ValueError(
            f"The LoRA '{lora}' is one of text encoders only, so it changes nothing in a MODEL. "
            "Connect the CLIP to the clip input."
        )
    if len(unknown) == num_asked:
        raise ValueError(
            f"The LoRA '{lora}' changes nothing in this MODEL: it was made for another kind of "
            f"model, with layers such as '{unknown[0]}'. Choose a LoRA of the same kind."
        )
    if 2 * len(unknown) >= num_asked:
        raise ValueError(
            f"{len(unknown)} of the {num_asked} layers of the LoRA '{lora}' are not in this MODEL "
            f"({some_of(unknown)}), so nothing was applied. It was made for another model: choose "
            "a LoRA of this one."
        )


def some_of(names: Sequence[str]) -> str:
    """The first few of some names, and that there are more."""
    shown = ", ".join(names[:3])
    return f"{shown}, …" if len(names) > 3 else shown


def _require_same_sizes(lora: str, found: _Found, model: Any, clip: Any) -> None:
    if isinstance(model, StorePatcher) and any(map(enlarges, found.patches.values())):
        raise ValueError(
            f"The LoRA '{lora}' is a control LoRA (Canny, Depth), which makes a matrix of the "
            "model larger, and weights of Load Quantized FLUX cannot be. Load the model with Load "
            "Diffusion Model for it."
        )
    _require_widths(lora, model.model, found.patches)
    if clip is not None:
        _require_widths(lora, clip.cond_stage_model, found.text_patches)


def _require_widths(lora: str, network: Any, patches: Patches) -> None:
    for key, patch in patches.items():
        name, rows = (key, None) if isinstance(key, str) else (key[0], key[1])
        layer = network.get_submodule(name.rpartition(".")[0])
        if not name.endswith(".weight") or not hasattr(layer, "in_features"):
            continue
        found = _shape(patch)
        wanted = (rows[2] if rows else layer.out_features, layer.in_features)
        if found not in (None, wanted):
            raise ValueError(
                f"The LoRA '{lora}' was made for another model: its '{name}' is {found[0]} x "
                f"{found[1]}, and that of this MODEL {wanted[0]} x {wanted[1]}. Choose a LoRA of "
                "this model."
            )
        scale = _dora_scale(patch)
        if scale is not None and scale.shape not in ((wanted[0], 1), (1, wanted[1])):
            raise ValueError(
                f"The LoRA '{lora}' is a DoRA whose magnitudes of '{name}' have the shape "
                f"{[*scale.shape]}, and {wanted[0]} x 1 or 1 x {wanted[1]} is needed. Choose "
                "another file."
            )


def _dora_scale(patch: Any) -> Tensor | None:
    match patch:
        case LoRAAdapter():
            return patch.weights[4]
        case LoHaAdapter():
            return patch.weights[7]
        case LoKrAdapter():
            return patch.weights[8]
    return None


def _shape(patch: Any) -> tuple[int, int] | None:
    """Rows and columns of the matrix that a patch changes, where it can say that."""
    weights = getattr(patch, "weights", None)
    match patch:
        case LoRAAdapter() if weights[3] is None and weights[5] is None:
            rows, columns = weights[0], weights[1]
        case LoHaAdapter() if weights[5] is None:
            rows, columns = weights[0], weights[1]
        case LoKrAdapter() if weights[7] is None:
            w1, w2, _, w1_a, w1_b, w2_a, w2_b, _, _ = weights
            tall = (w1 if w1 is not None else w1_a), (w2 if w2 is not None else w2_a)
            wide = (w1 if w1 is not None else w1_b), (w2 if w2 is not None else w2_b)
            shape = math.prod(one.shape[0] for one in tall), math.prod(one.shape[1] for one in wide)
            return shape if all(one.dim() == 2 for one in (*tall, *wide)) else None
        case ("diff", (Tensor() as rows, *_)):
            columns = rows
        case _:
            return None
    return (rows.shape[0], columns.shape[1]) if rows.dim() == columns.dim() == 2 else None


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
