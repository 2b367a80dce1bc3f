"""The MODEL face: ComfyUI's own network computing with a weight store; the patcher of both faces.

Every Linear of the network is a `StoreLinear`, so nothing of the host ever merges into, or writes
to, the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..trainers.flux import AXES, LATENT_CHANNELS, FluxConfig, norm_sources
from ..trainers.load import LoadedFlux
from ..trainers.store import WeightStore
from .linear import (
    PlacedLoras,
    RuntimeLora,
    StoreLinear,
    StoreModule,
    StoreOps,
    lora_bytes,
    loras_beside,
    patched_copy,
)


class _Original(NamedTuple):
    """An entry of the host's `backup`: a parameter as it was before its patches."""

    weight: Tensor


class StorePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose model computes from a store: the store moves bytes, never this class.

    Core's own loading walks parameters, merges patches into them and moves the whole model when a
    strength changes. Here patches are handed to the StoreLinears, which costs nothing.
    """

    @property
    def store(self) -> WeightStore:
        return self.model.atelier.store

    @property
    def _placed(self) -> PlacedLoras:
        return self.model.atelier_loras

    def model_size(self) -> int:
        """Bytes on the device of the weights and of the LoRAs of this patcher, hooks among them."""
        self.size = self.store.wanted_bytes + self._lora_bytes()
        return self.size

    def loaded_size(self) -> int:
        """Bytes on the device now, whichever patcher of the model brought them there."""
        if self.store.device != self.load_device:
            return 0
        return self.store.resident_bytes + self._placed.num_bytes

    def load(
        self,
        device_to=None,
        lowvram_model_memory=0,
        force_patch_weights=False,
        full_load=False,
        **newer: Any,
    ) -> None:
        is_limited = lowvram_model_memory > 0 and not full_load
        with self.use_ejected():
            self.unpatch_hooks()
            device = torch.device(device_to or self.load_device)
            self._take_off_patches(self._loras(), device)
            self.store.prepare(
                device, lowvram_model_memory - self._lora_bytes() if is_limited else None
            )
            self._set_patches({})
            self._follow_store()
            self.model.model_lowvram = False
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        before = self.loaded_size()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self._restore_objects()
            self.patch_model(load_weights=False)
            try:
                # Not 0, which would mean no limit.
                self.load(device_to, max(before + extra_memory, 0.1), force_patch_weights)
            except Exception:
                self.detach()  # as the host does: a model that did not fit is not left half on
                raise
        return self.loaded_size() - before

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        before = self.loaded_size()
        if self.store.streaming == "auto" and before:
            self.store.place(self.store.device, before - self._placed.num_bytes - memory_to_free)
        else:
            self._take_off_patches([], device_to)
            self.store.place(device_to)
        self._follow_store()
        return before - self.loaded_size()

    def unpatch_model(self, device_to=None, unpatch_weights=True) -> None:
        self.eject_model()
        if unpatch_weights:
            self.unpatch_hooks()
            self._take_off_patches([], self.store.device)
            self._patch_norms({})
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self.store.place(device_to)
                self._follow_store()
        self._restore_objects()

    def patch_weight_to_device(self, key, *args: Any, return_weight=False, **kwargs: Any):
        """A patch is never merged; newer hosts also ask for a patched copy."""
        return self._patched(key) if return_weight else None

    def patch_hooks(self, hooks) -> None:
        with self.use_ejected():
            self._set_patches(self.get_combined_hook_patches(hooks))
            self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set=None) -> None:
        if self.current_hooks is not None:
            self._set_patches({})
            self.current_hooks = None

    def model_state_dict(self, filter_prefix=None) -> dict[str, Tensor]:
        """Names with the stored bytes; a node that asks for a part wants its patched weights."""
        state = super().model_state_dict(filter_prefix)
        return state if filter_prefix is None else {key: self._patched(key) for key in state}

    def pin_weight_to_device(self, key) -> None:
        """Nothing: pinning belongs to the store."""

    unpin_weight = pin_weight_to_device

    def unpin_all_weights(self) -> None:
        """Nothing: pinning belongs to the store."""

    def _over_store(self) -> list[tuple[str, StoreModule]]:
        modules = self.model.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, StoreModule)]

    def _set_patches(self, hook_patches: dict[str, list[tuple]]) -> None:
        """Compute with this patcher's patches and those of hooks from now on, and no others."""
        patches = {key: [*patches] for key, patches in self.patches.items()}
        for key, more in hook_patches.items():
            patches[key] = [*patches.get(key, []), *more]
        for key, module in self._over_store():
            weight, bias = (patches.pop(f"{key}.{end}", []) for end in ("weight", "bias"))
            module.set_patches(weight, bias, self._placed)
        self._patch_norms(patches)

    def _take_off_patches(self, kept: Iterable[RuntimeLora], device: torch.device) -> None:
        """Compute without patches, and let go of the LoRAs but those `kept` for `device`."""
        for _, module in self._over_store():
            module.set_patches([], [], self._placed)
        self._placed.keep_only(kept, device, self._computing_dtype())

    def _loras(self) -> Iterator[RuntimeLora]:
        """Those of this patcher's patches and hooks, of which hooks run at times."""
        for name, module in self._over_store():
            if isinstance(module, StoreLinear):
                key = f"{name}.weight"
                patches = self.patches.get(key, [])
                for hook in ({}, *self.hook_patches.values()):
                    yield from loras_beside([*patches, *hook.get(key, [])])

    def _lora_bytes(self) -> int:
        return lora_bytes(self._loras(), self._computing_dtype())

    def _computing_dtype(self) -> torch.dtype:
        """That of what the network's Linears are given."""
        if self.is_clip:
            return torch.float32
        return self.get_model_object("manual_cast_dtype") or self.model.get_dtype()

    def _patch_norms(self, patches: dict[str, list[tuple]]) -> None:
        """Patch what is not looked up: norms, which are copies of the store's."""
        for key, original in self.backup.items():
            _set_parameter(self.model, key, original.weight)
        self.backup.clear()
        for key, some in patches.items():
            weight = comfy.utils.get_attr(self.model, key)
            self.backup[key] = _Original(weight)
            _set_parameter(self.model, key, patched_copy(key, weight, some))

    def _patched(self, key: str) -> Tensor:
        """The tensor of a key of patches, with its patches."""
        module_name, _, end = key.rpartition(".")
        module = self.model.get_submodule(module_name)
        if not isinstance(module, StoreModule):
            return getattr(module, end)
        patched = module.patched_weight() if end == "weight" else module.patched_bias()
        assert patched is not None
        return patched

    def _follow_store(self) -> None:
        self.model.to(self.store.device)  # the small tensors that are not in the store
        self.model.device = self.store.device
        self.model.model_loaded_weight_memory = self.loaded_size()

    def _restore_objects(self) -> None:
        for name, original in self.object_patches_backup.items():
            comfy.utils.set_attr(self.model, name, original)
        self.object_patches_backup.clear()


def _set_parameter(model: Any, key: str, value: Tensor) -> None:
    with torch.inference_mode(False):  # also used outside of it, where others cannot be wrapped
        device = comfy.utils.get_attr(model, key).device
        comfy.utils.set_attr_param(model, key, value.to(device, copy=True))


def build_model(loaded: LoadedFlux, compute_dtype: torch.dtype) -> StorePatcher:
    """A true ComfyUI MODEL over `loaded.store`, computing in `compute_dtype`."""
    config = loaded.config
    with torch.inference_mode(False):
        model_config = _model_class(config)(_unet_config(config))
        model_config.custom_operations = StoreOps
        model_config.set_inference_dtype(
            torch.bfloat16, None if compute_dtype == torch.bfloat16 else compute_dtype
        )
        model = model_config.get_model({}, device=torch.device("cpu"))
        for name, module in model.diffusion_model.named_modules():
            if isinstance(module, StoreModule):
                module.bind(loaded.store, name)
        model.load_model_weights(_norm_scales(loaded))
    model.atelier, model.atelier_loras = loaded, PlacedLoras()
    return StorePatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _model_class(config: FluxConfig):
    inpaint = comfy.supported_models.FluxInpaint
    if config.in_channels == 4 * inpaint.unet_config["in_channels"]:  # Canny and Depth have fewer
        return inpaint
    return comfy.supported_models.Flux if config.guidance else comfy.supported_models.FluxSchnell


def _unet_config(config: FluxConfig) -> dict[str, Any]:
    """The explicit configuration: the host's detection knows only some sizes."""
    values = {
        "image_model": "flux",
        "in_channels": config.in_channels // 4,
        "out_channels": LATENT_CHANNELS,
        "vec_in_dim": config.vector_dim,
        "context_in_dim": config.context_dim,
        "hidden_size": config.hidden_size,
        "mlp_ratio": 4.0,
        "num_heads": config.num_heads,
        "depth": config.depth,
        "depth_single_blocks": config.depth_single,
        "axes_dim": list(AXES),
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": config.guidance,
    }
    if "txt_ids_dims" in {field.name for field in dataclasses.fields(FluxParams)}:
        values["txt_ids_dims"] = []
    return values


def _norm_scales(loaded: LoadedFlux) -> dict[str, Tensor]:
    names = [f"{name}.scale" for name in norm_sources(loaded.config).values()]
    return {name: loaded.store.plain[name].clone() for name in names}


def to_training_device(model: Any, memory_required: int) -> None:
    """Bring a MODEL without patches to the compute device, `memory_required` bytes free beside it.

    Core takes off what another clone has merged into the weights.
    """
    comfy.model_management.load_models_gpu([model], memory_required=memory_required)
