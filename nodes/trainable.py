"""What is trained on of a MODEL: its own weights, or where ComfyUI pages these, those of its file;
with its LoRAs, which stay as they are.

Newer ComfyUIs page the weights of their own loaders' MODELs in and out on NVIDIA cards (dynamic
VRAM): no tensor of them stays. Their patcher remembers how it was loaded, for copies on other
devices (`cached_patcher_init`: a function of comfy.sd and its arguments, a file the first).
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainers.devices import compute_dtype
from ..trainers.flux import FluxConfig
from ..trainers.frozen import FrozenLora
from ..trainers.load import BaseFlux, inspect_flux, load_flux
from ..trainers.lora_file import LoraTensors
from ..trainers.memory import empty_store, store_bytes
from ..trainers.packed_weight import Matrix
from ..trainers.store import Weights, WeightStore
from ..trainers.tensor_files import TensorFiles, model_files, original_name
from . import host
from .linear import kind_of_patch, runtime_lora
from .native import StorePatcher, build_model
from .native_lora import add_lora
from .parameters import flux_of_parameters

_CORE_LOADERS = {
    ("comfy.sd", "load_diffusion_model"),
    ("comfy.sd", "load_checkpoint_guess_config"),
}
"""The functions that make a MODEL of one safetensors file, changing nothing but its types."""


class GivenModel:
    """A MODEL that is trained on as it is."""

    sentences: tuple[str, ...] = ()
    """What a user should know of it when the training starts."""
    other_copy = 0
    """Bytes of the same weights that the host keeps beside those of `base`."""

    def __init__(self, model: Any) -> None:
        self.base = base_flux(model)
        self._unpatched = without_patches(model)

    def require_memory(self) -> None:
        """Raises ValueError if the system's memory cannot hold what `load` reads."""

    def load(self) -> Any:
        """The MODEL without patches, with the weights of `base`, which are there from now on."""
        return self._unpatched


class ModelOfFile:
    """A MODEL that is trained on by its file, of which only the headers are read until `load`."""

    def __init__(self, model: Any, path: Path) -> None:
        self._path, self._model = path, None
        config = inspect_flux(path).config
        self._weights = FileWeights(config, _format_like(model, config))
        identity = TensorFiles(model_files(path)).identity()
        base = BaseFlux(self._weights, config, identity, str(path), self._weights.format)
        self.base = with_loras_of(model, base)
        self.other_copy = model.model_size()
        self.sentences = (
            "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), so the training "
            f"reads '{path.name}' a second time, in {self._weights.format}.",
        )

    def require_memory(self) -> None:
        needed, free = self._weights.num_bytes, host.free_system_memory()
        if needed > free:
            raise ValueError(
                "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), so the "
                f"training would read '{self._path.name}' a second time: {needed / 1e9:.1f} GB of "
                f"system memory, where {free / 1e9:.1f} are free. Load it by Load Quantized FLUX, "
                "which keeps one copy, or start ComfyUI with --disable-dynamic-vram."
            )

    def load(self) -> Any:
        if self._model is None:
            device = host.compute_device()
            loaded = load_flux(
                self._path,
                format=self._weights.format,
                quantize_on=device,
                on_progress=host.Progress().update,
            )
            self._weights.fill(loaded.store)
            self._model = build_model(loaded, compute_dtype("auto", device))  # it only moves them
        return self._model


class FileWeights:
    """The weights of a FLUX file: their sizes, and from `fill` on they themselves."""

    streaming = "auto"

    def __init__(self, config: FluxConfig, format: str) -> None:
        self.format = format
        self._store = empty_store(config, format)
        self._is_read = False

    def fill(self, store: WeightStore) -> None:
        self._store, self._is_read = store, True

    @property
    def packed(self) -> Mapping[str, Matrix]:
        return self._store.packed

    @property
    def plain(self) -> Mapping[str, Tensor]:
        return self._store.plain

    @property
    def device(self) -> torch.device:
        return self._store.device

    @property
    def num_bytes(self) -> int:
        return self._store.num_bytes

    @property
    def bytes_in_ram(self) -> int | None:
        return self._store.bytes_in_ram if self._is_read else None


def model_to_train(model: Any) -> GivenModel | ModelOfFile:
    """What is trained on of a MODEL.

    Raises:
        ValueError: if it is no FLUX.1, or carries patches that are no plain LoRAs, or its weights
            do not stay and its file is not known.
    """
    path = file_of_paged(model)
    return GivenModel(model) if path is None else ModelOfFile(model, path)


def file_of_paged(model: Any) -> Path | None:
    """The file of a MODEL whose weights have no place that stays; None for all others.

    Raises:
        ValueError: if that file is not known.
    """
    if not (hasattr(model, "is_dynamic") and model.is_dynamic()):
        return None
    path = _source(model)
    if path is None:
        raise ValueError(
            "ComfyUI pages the weights of this MODEL in and out (dynamic VRAM), and the file they "
            "came from is not known, so they cannot be read. Load it by Load Quantized FLUX, or "
            "start ComfyUI with --disable-dynamic-vram."
        )
    return path


def _source(model: Any) -> Path | None:
    """The file that one of ComfyUI's own loaders read, or None."""
    loading = getattr(model, "cached_patcher_init", None)
    if loading is None:
        return None
    load, arguments = loading[:2]
    return Path(arguments[0]) if (load.__module__, load.__name__) in _CORE_LOADERS else None


def _format_like(model: Any, config: FluxConfig) -> str:
    """What takes as much memory as the MODEL, whose weights ComfyUI keeps in the types of the file:
    fp8 for an fp8 file, whose bytes are then kept."""
    has_8_bits = model.model_size() < 0.75 * store_bytes(config, "bf16")
    return "fp8" if has_8_bits else "bf16"


def base_flux(model: Any) -> BaseFlux:
    """The FLUX behind a MODEL, ours or the core's, with its LoRAs frozen.

    Raises:
        ValueError: if it is no FLUX.1, or carries patches that are no plain LoRAs.
    """
    is_ours = isinstance(model, StorePatcher)
    return with_loras_of(model, model.model.atelier if is_ours else flux_of_parameters(model))


def with_loras_of(model: Any, base: BaseFlux) -> BaseFlux:
    """`base` with the LoRAs that a MODEL of the same weights carries, frozen; their shapes are all
    that is asked of the weights.

    Raises:
        ValueError: if the MODEL carries patches that are no plain LoRAs.
    """
    return dataclasses.replace(base, frozen=_frozen_loras(model, base.store))


def assistant_loras(model: Any, base: BaseFlux, tensors: LoraTensors) -> tuple[FrozenLora, ...]:
    """The LoRA of a file as one that helps to train `base`, the network of the MODEL.

    Raises:
        ValueError: if it belongs to another model, or is no plain LoRA.
    """
    assisted = add_lora(without_patches(model), tensors, 1.0)
    patches = [patch for some in assisted.patches.values() for patch in some]
    wrong = [kind_of_patch(patch) for patch in patches if runtime_lora(patch) is None]
    if wrong:
        raise ValueError(
            f"The assistant '{tensors.name}' has a part of the kind '{wrong[0]}', and only plain "
            "LoRAs can assist a training. Choose another one, or none."
        )
    return _frozen_loras(assisted, base.store)


def _frozen_loras(model: Any, store: Weights) -> tuple[FrozenLora, ...]:
    """The LoRAs on a MODEL, those of a strength of 0 left out."""
    if "bypass_lora" in model.injections:  # newer hosts' loader that patches nothing
        raise ValueError(
            "This MODEL carries a LoRA in bypass mode, which training cannot see. Put it on with "
            "Apply LoRA or Load LoRA instead."
        )
    if model.hook_patches:  # ranges of Apply LoRA, and other packs' hooks on a MODEL
        raise ValueError(
            "This MODEL carries a LoRA that acts in a part of the sampling only, which a training "
            "has not. Set its start_percent to 0 and its end_percent to 1, or take it off."
        )
    return tuple(
        _frozen_lora(key, patch, store)
        for key, patches in sorted(model.patches.items())
        for patch in patches
        if patch[0] != 0
    )


def _frozen_lora(key: str, patch: tuple, store: Weights) -> FrozenLora:
    matrix = store.packed.get(original_name(key))
    lora = runtime_lora(patch) if matrix is not None else None
    if lora is None or matrix is None:
        raise ValueError(
            f"This MODEL carries a patch of the kind '{kind_of_patch(patch)}' on '{key}', and only "
            "plain LoRAs can be trained on top of. Take it off, or make it a part of the weights "
            "with Fuse LoRA and train on that."
        )
    name = original_name(key).removesuffix(".weight")
    lora.check_shape(name, *matrix.shape)
    start, down, up = lora.rows.start or 0, lora.down.cpu(), lora.ordered_up().cpu()
    return FrozenLora(name=name, start=start, down=down, up=up, scale=lora.scale)


def without_patches(model: Any) -> Any:
    """The MODEL, or a clone of it without its patches."""
    if not model.patches:
        return model
    clone = model.clone()
    clone.patches, clone.patches_uuid = {}, uuid.uuid4()
    return clone
