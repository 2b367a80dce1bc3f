"""The MODEL that is trained on: the one given, or where ComfyUI pages its weights, one of its file.

Newer ComfyUIs page the weights of their own loaders' MODELs in and out on NVIDIA cards (dynamic
VRAM): no tensor of them stays. Their patcher remembers how it was loaded, for copies on other
devices (`cached_patcher_init`: a function of comfy.sd and its arguments, a file the first).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..trainers.devices import compute_dtype
from ..trainers.load import inspect_flux, load_flux
from ..trainers.memory import store_bytes
from . import host
from .native import build_model, without_patches

_CORE_LOADERS = {
    ("comfy.sd", "load_diffusion_model"),
    ("comfy.sd", "load_checkpoint_guess_config"),
}
"""The functions that make a MODEL of one safetensors file, changing nothing but its types."""


def model_to_train(model: Any, say: Callable[[str], None]) -> Any:
    """`model` without its patches, or one of the file it was loaded from, if weights do not stay.

    Args:
        say: shows a sentence while the file is read, which can take minutes.

    Raises:
        ValueError: if its weights do not stay, and its file is not known, is no FLUX.1, or does not
            fit into the system's memory a second time.
    """
    if not is_paged(model):
        return without_patches(model)
    path = _source(model)
    if path is None:
        raise ValueError(
            "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), and the file they "
            "came from is not known, so it cannot be trained. Load it by Load Quantized FLUX, or "
            "start ComfyUI with --disable-dynamic-vram."
        )
    config = inspect_flux(path).config
    has_8_bits = model.model_size() < 0.75 * store_bytes(config, "bf16")
    format = "fp8" if has_8_bits else "bf16"  # what takes as much memory as the MODEL
    needed, free = store_bytes(config, format), host.free_system_memory()
    if needed > free:
        raise ValueError(
            "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), so the training "
            f"would read '{path.name}' a second time: {needed / 1e9:.1f} GB of system memory, "
            f"where {free / 1e9:.1f} are free. Load it by Load Quantized FLUX, which keeps one "
            "copy, or start ComfyUI with --disable-dynamic-vram."
        )
    say(
        "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), so the training reads "
        f"'{path.name}' a second time, in {format}."
    )
    device = host.compute_device()
    progress = host.Progress().update
    loaded = load_flux(path, format=format, quantize_on=device, on_progress=progress)
    return build_model(loaded, compute_dtype("auto", device))  # it only moves the weights


def is_paged(model: Any) -> bool:
    """Whether the weights of a MODEL have no place that stays."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def _source(model: Any) -> Path | None:
    """The file that one of ComfyUI's own loaders read, or None."""
    loading = getattr(model, "cached_patcher_init", None)
    if loading is None:
        return None
    load, arguments = loading[:2]
    return Path(arguments[0]) if (load.__module__, load.__name__) in _CORE_LOADERS else None
