"""The MODEL face: ComfyUI's own FLUX network computing with a weight store, and its patcher.

Every Linear of the network is a `StoreLinear`: it owns no weight, and a LoRA on it is a function
applied at forward time. So nothing of the host ever merges into, or writes to, the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.patcher_extension import CallbacksMP
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from ..trainers.flux import AXES, LATENT_CHANNELS, FluxConfig, norm_sources
from ..trainers.load import LoadedFlux
from ..trainers.store import PackedWeight, WeightStore

_PREFIX = "diffusion_model."


@dataclass(frozen=True)
class RuntimeLora:
    """A LoRA on some rows of a Linear, in activation space: y[rows] += scale * up(down(x))."""

    down: Tensor
    up: Tensor
    scale: float
    rows: slice

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the LoRA's part to `y` [..., out], in place, for the input `x` [..., in]."""
        hidden = F.linear(x, self.down.to(x.dtype))
        y[..., self.rows] += self.scale * F.linear(hidden, self.up.to(x.dtype))


@dataclass(frozen=True)
class DensePatches:
    """Patches of ComfyUI that need the dense weight (LoKr, LoHa, DoRA, differences)."""

    key: str
    patches: list[tuple]

    def apply(self, weight: Tensor) -> Tensor:
        """The patched copy of `weight`, in its dtype."""
        patched = comfy.lora.calculate_weight(self.patches, weight.float().clone(), self.key)
        return patched.to(weight.dtype)


class StoreLinear(nn.Linear):
    """A Linear of the host's network whose weight and bias are looked up in a store by name."""

    comfy_cast_weights = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.weight_function: list[Callable] = []
        self.bias_function: list[Callable] = []
        self._loras: list[RuntimeLora] = []
        self._dense_weight: DensePatches | None = None
        self._dense_bias: DensePatches | None = None

    def bind(self, store: WeightStore, name: str) -> None:
        """Compute with `<name>.weight` and `<name>.bias` of `store` from now on."""
        self._store, self._name = store, name

    @property
    def packed(self) -> PackedWeight:
        return self._store.packed[f"{self._name}.weight"]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The stored bytes: only what asks for a name, a shape or a device should look here."""
        return self.packed.data

    @property
    def bias(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._store.plain.get(f"{self._name}.bias")

    def set_patches(self, weight: list[tuple], bias: list[tuple]) -> None:
        """Replace the patches (ComfyUI's tuples) that run on top of the stored weight."""
        device, key = self._store.device, f"{_PREFIX}{self._name}"
        loras = [_runtime_lora(patch, device) for patch in weight]
        as_dense = any(lora is None for lora in loras)
        self._loras = [] if as_dense else [lora for lora in loras if lora is not None]
        self._dense_weight = DensePatches(f"{key}.weight", weight) if as_dense else None
        self._dense_bias = DensePatches(f"{key}.bias", bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if self._dense_bias is not None and bias is not None:
            bias = self._dense_bias.apply(bias)
        if self._dense_weight is not None:
            weight = self._dense_weight.apply(self.packed.dequantize(x.dtype))
            return F.linear(x, weight, bias.to(x.dtype) if bias is not None else None)
        y = self.packed.linear(x, bias)
        for lora in self._loras:
            lora.add_to(y, x)
        return y

    def _apply(self, fn: Callable, recurse: bool = True) -> StoreLinear:
        return self  # `.to()` of a parent never moves or casts the store's bytes

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing to load: the store has it."""


class StoreOps(comfy.ops.manual_cast):
    """The host's operations with every Linear computing from a store."""

    Linear = StoreLinear


def _runtime_lora(patch: tuple, device: torch.device) -> RuntimeLora | None:
    """A patch of ComfyUI as a RuntimeLora, or None if it is not a plain LoRA on whole rows."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if middle is not None or dora_scale is not None or reshape is not None:
        return None
    if offset is not None and offset[0] != 0:
        return None
    rows = slice(None) if offset is None else slice(offset[1], offset[1] + offset[2])
    scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
    return RuntimeLora(down.to(device), up.to(device), scale, rows)


class StorePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher whose model computes from a store: the store moves bytes, never this class.

    Core's own loading walks parameters, merges patches into them and moves the whole model when a
    strength changes. Here patches are handed to the StoreLinears, which costs nothing.
    """

    @property
    def store(self) -> WeightStore:
        return self.model.atelier.store

    def model_size(self) -> int:
        self.size = self.store.num_bytes
        return self.size

    def loaded_size(self) -> int:
        return self.store.num_bytes if self.store.device == self.load_device else 0

    def load(self, device_to=None, *args: Any, **kwargs: Any) -> None:
        with self.use_ejected():
            self.unpatch_hooks()
            self._place(device_to or self.load_device)
            self._set_patches({})
            self.model.model_lowvram = False
            self.model.current_weight_patches_uuid = self.patches_uuid
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, *args, *kwargs.values())
            self.apply_hooks(self.forced_hooks, force_apply=True)

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False) -> int:
        before = self.loaded_size()
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self._restore_objects()
            self.patch_model(load_weights=False)
            self.load(device_to)
        return self.loaded_size() - before

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
        before = self.loaded_size()
        self._place(device_to)
        return before - self.loaded_size()

    def unpatch_model(self, device_to=None, unpatch_weights=True) -> None:
        self.eject_model()
        if unpatch_weights:
            self.unpatch_hooks()
            for _, linear in self._linears():
                linear.set_patches([], [])
            self.model.current_weight_patches_uuid = None
            if device_to is not None:
                self._place(device_to)
        self._restore_objects()

    def patch_weight_to_device(self, key, *args: Any, **kwargs: Any) -> None:
        """Nothing: a patch is never merged."""

    def patch_hook_weight_to_device(
        self, hooks, combined_patches, key, *args: Any, **kwargs
    ) -> None:
        self._set_patches(combined_patches, only=key)
        self.hook_backup[key] = ()  # tells the host that hooks are on

    def unpatch_hooks(self, whitelist_keys_set=None) -> None:
        if self.hook_backup:
            self.hook_backup.clear()
            self._set_patches({})
        self.current_hooks = None

    def pin_weight_to_device(self, key) -> None:
        """Nothing: pinning belongs to the store."""

    unpin_weight = pin_weight_to_device

    def unpin_all_weights(self) -> None:
        """Nothing: pinning belongs to the store."""

    def _linears(self) -> list[tuple[str, StoreLinear]]:
        modules = self.model.diffusion_model.named_modules()
        return [(name, module) for name, module in modules if isinstance(module, StoreLinear)]

    def _set_patches(self, hook_patches: dict[str, list[tuple]], only: str | None = None) -> None:
        """Give every Linear (or the one of key `only`) this patcher's and the hooks' patches."""
        for name, linear in self._linears():
            weight_key, bias_key = f"{_PREFIX}{name}.weight", f"{_PREFIX}{name}.bias"
            if only in (None, weight_key, bias_key):
                linear.set_patches(
                    [*self.patches.get(weight_key, []), *hook_patches.get(weight_key, [])],
                    [*self.patches.get(bias_key, []), *hook_patches.get(bias_key, [])],
                )

    def _place(self, device) -> None:
        self.store.place(device)
        self.model.to(device)  # the small tensors that are not in the store
        self.model.device = torch.device(device)
        self.model.model_loaded_weight_memory = self.loaded_size()

    def _restore_objects(self) -> None:
        for name, original in self.object_patches_backup.items():
            comfy.utils.set_attr(self.model, name, original)
        self.object_patches_backup.clear()


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
            if isinstance(module, StoreLinear):
                module.bind(loaded.store, name)
        model.load_model_weights(_norm_scales(loaded))
    model.atelier = loaded
    return StorePatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def _model_class(config: FluxConfig):
    if config.in_channels > 4 * LATENT_CHANNELS:
        return comfy.supported_models.FluxInpaint
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


def loaded_flux(model: Any) -> LoadedFlux:
    """The FLUX behind a MODEL of ours.

    Raises:
        ValueError: if the MODEL comes from another loader, or carries LoRAs.
    """
    if not isinstance(model, StorePatcher):
        raise ValueError(
            "This MODEL was not loaded by Load Quantized FLUX, and only its models can be trained. "
            "Replace the loader of the model by Load Quantized FLUX."
        )
    if model.patches:
        raise ValueError(
            "This MODEL carries a LoRA, and training starts from a model without one. Connect "
            "Train LoRA to Load Quantized FLUX directly."
        )
    return model.model.atelier


def add_lora(model: Any, tensors: dict[str, Tensor], strength: float) -> Any:
    """A clone of any MODEL with the LoRA file's tensors as patches, as the core LoraLoader does."""
    return comfy.sd.load_lora_for_models(model, None, dict(tensors), strength, 0.0)[0]


def to_training_device(model: StorePatcher, memory_required: int) -> None:
    """Bring the store to the compute device, with `memory_required` bytes free beside it."""
    comfy.model_management.load_models_gpu(
        [model], memory_required=memory_required, force_full_load=True
    )


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """How a sample picture is drawn, in ComfyUI's terms."""

    width: int
    height: int
    steps: int
    seed: int
    sampler: str = "euler"
    scheduler: str = "simple"


def draw_latents(model: Any, positive: list, settings: SampleSettings) -> Tensor:
    """Latents [1, 16, height/8, width/8] drawn by ComfyUI's own sampling, without CFG."""
    empty = torch.zeros(1, LATENT_CHANNELS, settings.height // 8, settings.width // 8)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(empty, settings.seed),
        settings.steps,
        1.0,
        settings.sampler,
        settings.scheduler,
        positive,
        positive,  # with a CFG of 1 the negative is never computed
        empty,
        disable_pbar=True,
        seed=settings.seed,
    )
