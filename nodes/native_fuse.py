"""MODELs, ours and the core's, as tensors to fuse: what they were loaded from, their patches as a
change of it, and the MODEL of what came out."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..trainers.changes import Change
from ..trainers.devices import compute_dtype
from ..trainers.fuse import Origin, WeightTensors, origin_of, with_change, working_bytes
from ..trainers.load import FluxSource, LoadedFlux, open_flux
from ..trainers.tensor_files import original_name
from .linear import runtime_lora
from .native import StorePatcher, build_model, to_training_device
from .parameters import flux_of_parameters
from .trainable import file_of_paged, without_patches

_NETWORK = "diffusion_model"


def origin_of_model(model: Any) -> Origin:
    """What a MODEL was loaded from, without the patches that it carries now.

    The weights of a MODEL of ComfyUI's own loaders are what it holds; where ComfyUI pages them in
    and out, those of its file.

    Raises:
        ValueError: if it is no FLUX.1, or its file is gone or another one now.
    """
    if isinstance(model, StorePatcher):
        return origin_of(model.model.atelier)
    path = file_of_paged(model)
    if path is not None:
        return _origin_of_file(path)
    base = flux_of_parameters(model)
    to_training_device(without_patches(model), 0)  # takes merged LoRAs off the parameters
    return Origin(
        tensors=WeightTensors(base.store),
        config=base.config,
        identity=base.identity,
        format=base.format,
    )


def _origin_of_file(path: Path) -> Origin:
    tensors, identity, config = open_flux(path)
    source = FluxSource(str(path), identity)
    return Origin(tensors=tensors, config=config, identity=identity, format="bf16", source=source)


def with_patches_of(model: Any, origin: Origin, scale: float = 1.0) -> Origin:
    """`origin` with the patches of a MODEL in its tensors: W + scale * (patched W - W), which for
    LoRAs is `scale` times the strength of each.

    Raises:
        ValueError: if a LoRA was made for another model, or is in a mode that patches nothing.
    """
    if "bypass_lora" in model.injections:  # newer hosts' loader that patches nothing
        raise ValueError(
            "This MODEL carries a LoRA in bypass mode, which cannot be fused. Put it on with Apply "
            "LoRA or Load LoRA instead."
        )
    if not model.patches:
        return origin
    # Not the model itself, which the new one would keep in memory.
    patches = {original_name(key): (key, [*some]) for key, some in model.patches.items()}
    shapes = {name: origin.tensors.shapes[name] for name in patches}
    for name, (_, some) in patches.items():
        _check_shapes(name, some, shapes[name])

    def apply(name: str, tensor: Tensor) -> Tensor:
        key, some = patches[name]
        before = tensor.clone() if scale != 1 else tensor
        patched = comfy.lora.calculate_weight(some, tensor, key)
        if patched.shape != shapes[name]:
            raise ValueError(
                f"A patch on this MODEL changes the size of '{name}', which makes another kind of "
                "model of it. Take it off before its LoRAs are fused."
            )
        return torch.lerp(before, patched, scale) if scale != 1 else patched

    fingerprint = _fingerprint(model.patches, scale)
    return with_change(
        origin, Change(names=frozenset(patches), apply=apply, fingerprint=fingerprint)
    )


def _check_shapes(name: str, patches: list[tuple], shape: tuple[int, ...]) -> None:
    """Raises ValueError for LoRAs of other widths, which ComfyUI would leave out without a word."""
    for patch in patches:
        lora = runtime_lora(patch)
        if lora is not None and len(shape) == 2:
            lora.check_shape(name.removesuffix(".weight"), *shape)


def _fingerprint(patches: dict[str, list[tuple]], scale: float) -> str:
    """SHA-256 over all numbers and places of patches."""
    digest = hashlib.sha256(repr(scale).encode())
    for key in sorted(patches):
        digest.update(key.encode())
        for strength, value, *rest in patches[key]:
            content = getattr(value, "weights", value)  # of an adapter, or of a tuple of ComfyUI
            for leaf in tree_leaves((type(value).__name__, strength, content, rest)):
                digest.update(_bytes(leaf))
    return digest.hexdigest()


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        numbers = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{leaf.dtype} {[*leaf.shape]} ".encode() + numbers
    return repr(getattr(leaf, "__name__", leaf)).encode()


def model_of(fused: LoadedFlux, model: Any) -> StorePatcher:
    """The MODEL of a fused FLUX, with all but the patches that `model` carries: what nodes set for
    its sampling, and the hooks, whose LoRAs come and go.

    Raises:
        ValueError: if a node has replaced a part of the network.
    """
    replaced = [name for name in model.object_patches if name.startswith(_NETWORK)]
    if replaced:
        raise ValueError(
            f"A node has replaced '{replaced[0]}' of this MODEL, and fusing makes a new network. "
            "Put that node behind Fuse LoRA."
        )
    given, new = model.clone(), build_model(fused, _computing_dtype(model))
    for name in ("model_options", "attachments", "additional_models", "callbacks", "wrappers"):
        setattr(new, name, getattr(given, name))
    new.object_patches = copy.copy(given.object_patches)
    new.injections, new.hook_patches = given.injections, given.hook_patches
    new.forced_hooks, new.hook_mode = given.forced_hooks, given.hook_mode
    return new


def _computing_dtype(model: Any) -> torch.dtype:
    dtype = model.get_model_object("manual_cast_dtype") or model.model.get_dtype()
    is_known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return dtype if is_known else compute_dtype("auto", model.load_device)


def make_room(origin: Origin, device: torch.device) -> None:
    """Let ComfyUI free what the work on one matrix takes on a device."""
    if device.type != "cpu":
        comfy.model_management.free_memory(working_bytes(origin), device)
