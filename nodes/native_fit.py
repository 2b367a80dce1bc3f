"""Whether a LoRA fits a MODEL and a CLIP: each function raises ValueError where it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.lokr import LoKrAdapter
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from ..trainers.block_weights import BlockWeights
from ..trainers.lora_names import is_second_magnitude, read_module, split_name
from .linear import enlarges
from .native import StorePatcher

Patches = dict[Any, Any]
"""What `comfy.lora.load_lora` gives: by a key of the model, or by it with rows, an adapter."""


def require_known(block_weights: BlockWeights, model: Any) -> None:
    """See that block weights are for layers of a MODEL."""
    names = (name for name, _ in model.model.named_modules())
    for pattern in block_weights.matching_none(names) if block_weights.lines else ():
        raise ValueError(
            f"The block weight '{pattern}' matches no layer of this MODEL. Write a part of its "
            "names, such as 'double_blocks.0-9' or 'single_blocks', with * for any letters."
        )


def require_one_spelling(lora: str, tensors: dict[str, Tensor], names: dict[str, Any]) -> None:
    """ComfyUI would take one of two tensors for the same thing, and leave the other out."""
    taken: dict[Any, str] = {}
    for name in tensors:
        module, _, part = split_name(name)
        if is_second_magnitude(name, tensors):
            continue
        target = names.get(read_module(module, names))
        other = taken.setdefault((target, part), name)
        if target is not None and other != name:
            raise ValueError(
                f"The LoRA '{lora}' has two tensors for the same matrix: '{other}' and '{name}'. "
                "Choose another file."
            )


def require_no_bias(lora: str, tensors: dict[str, Tensor]) -> None:
    """ComfyUI would leave them out without a word."""
    for name in tensors:
        if split_name(name)[2] == "bias":
            raise ValueError(
                f"The LoRA '{lora}' was trained with lora_bias of peft, which ComfyUI does not "
                f"compute: it has '{name}'. Choose a LoRA that was trained without."
            )


def require_most(lora: str, num_known: int, unknown: Sequence[str]) -> None:
    """See that most layers of a LoRA are in a MODEL or CLIP, of those that are asked for."""
    num_asked = num_known + len(unknown)
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


def require_no_larger(lora: str, patches: Patches, model: Any) -> None:
    """See that a quantized model's matrices stay as large as they are."""
    if isinstance(model, StorePatcher) and any(map(enlarges, patches.values())):
        raise ValueError(
            f"The LoRA '{lora}' is a control LoRA (Canny, Depth), which makes a matrix of the "
            "model larger, and weights of Load Quantized FLUX cannot be. Load the model with Load "
            "Diffusion Model for it."
        )


def require_widths(lora: str, patches: Patches, network: Any) -> None:
    """See that what a LoRA adds to each Linear of a network is as large as it."""
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
