"""The operations of the MODEL and CLIP faces: they look their weights up in a store, and a Linear
runs LoRAs beside its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.ops
import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from ..trainers.packed_weight import PackedWeight
from ..trainers.store import WeightStore

_Source = tuple[int, Callable | None]
"""The identity of a tensor that ComfyUI holds, and what it does to the rows."""


@dataclass(frozen=True, eq=False)
class RuntimeLora:
    """A LoRA on some rows of a Linear, in activation space: y[rows] += scale * up(down(x)).

    `reorder` is what ComfyUI does to the rows of `up` before they are used.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: slice
    reorder: Callable[[Tensor], Tensor] | None = None

    @property
    def sources(self) -> dict[_Source, Tensor]:
        """Both tensors by what tells them from others, which is the same at every strength."""
        return {(id(self.down), None): self.down, (id(self.up), self.reorder): self.up}

    def ordered_up(self) -> Tensor:
        """`up` in the order of the Linear's rows."""
        return self.reorder(self.up) if self.reorder else self.up

    def check_shape(self, name: str, out_features: int, in_features: int) -> None:
        """Raises ValueError if the Linear `name` has other widths: it is another model's LoRA."""
        wanted = len(range(*self.rows.indices(out_features))), in_features
        found = self.up.shape[0], self.down.shape[1]
        if found != wanted:
            raise ValueError(
                f"A LoRA on this model was made for another one: its '{name}' is {found[0]} x "
                f"{found[1]}, and that of this model {wanted[0]} x {wanted[1]}. Choose a LoRA of "
                "this model."
            )

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add the LoRA's part to `y` [..., out], in place, for the input `x` [..., in]."""
        # No copies: both are placed in the dtype that computes, unless another node changes it.
        hidden = F.linear(x, self.down.to(x.dtype)).reshape(-1, self.down.shape[0])
        rows = y.view(-1, y.shape[-1])[:, self.rows]
        # One pass over y: what a LoRA costs is the reading and writing of it.
        rows.addmm_(hidden, self.up.to(x.dtype).T, alpha=self.scale)


def lora_bytes(loras: Iterable[RuntimeLora], dtype: torch.dtype) -> int:
    """What their tensors take in `dtype`, those of several LoRAs once."""
    sources = {key: tensor for lora in loras for key, tensor in lora.sources.items()}
    return sum(tensor.numel() for tensor in sources.values()) * dtype.itemsize


class PlacedLoras:
    """The tensors of a network's LoRAs on the device and in the dtype that compute.

    Each is copied and cast once, whatever the strengths of the LoRAs that have it, and stays until
    others are wanted: hooks take LoRAs off and on again in every step.
    """

    def __init__(self) -> None:
        self._target = torch.device("cpu"), torch.float32
        # Beside each tensor the one it comes from: as long as that lives, no other has its id.
        self._tensors: dict[_Source, tuple[Tensor, Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        return sum(placed.nbytes for placed, _ in self._tensors.values())

    def keep_only(
        self, loras: Iterable[RuntimeLora], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Let go of what is not of these LoRAs; place on `device` in `dtype` from now on."""
        wanted = {key for lora in loras for key in lora.sources}
        if (device, dtype) != self._target:
            wanted.clear()
        self._target = device, dtype
        self._tensors = {key: pair for key, pair in self._tensors.items() if key in wanted}

    def place(self, lora: RuntimeLora) -> RuntimeLora:
        """The same LoRA with its tensors where they compute, in the order of the Linear's rows."""
        for key, source in lora.sources.items():
            if key not in self._tensors:
                tensor = source if key[1] is None else lora.ordered_up()
                self._tensors[key] = tensor.to(*self._target), source
        down, up = self._tensors[id(lora.down), None], self._tensors[id(lora.up), lora.reorder]
        return replace(lora, down=down[0], up=up[0], reorder=None)


def patched_copy(key: str, weight: Tensor, patches: list[tuple]) -> Tensor:
    """`weight` in float32 with patches of ComfyUI."""
    copy = weight.to(torch.float32, copy=True)
    # Other models as LoRAs (Create Hook Model as LoRA) are taken off from the original.
    return comfy.lora.calculate_weight(patches, copy, key, original_weights={key: [(weight,)]})


@dataclass(frozen=True)
class DensePatches:
    """Patches of ComfyUI that need the dense weight (LoKr, LoHa, DoRA, differences)."""

    key: str
    patches: list[tuple]

    def apply(self, weight: Tensor) -> Tensor:
        """The patched copy of `weight`, in float32."""
        return patched_copy(self.key, weight, self.patches)


class _InStore(nn.Module):
    """A module whose tensors are looked up in a store by name, and which never moves them."""

    def bind(self, store: WeightStore, name: str) -> None:
        """Compute with `<name>.weight` and `<name>.bias` of `store` from now on."""
        self._store, self._name = store, name

    def _apply(self, fn: Callable, recurse: bool = True):
        return self  # `.to()` of a parent never moves or casts the store's bytes

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing to load: the store has it."""


class StoreLinear(_InStore, nn.Linear):
    """A Linear of the host's network over a store."""

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
        self._patches: list[tuple] = []
        self._loras: list[RuntimeLora] = []
        self._dense_weight: DensePatches | None = None
        self._dense_bias: DensePatches | None = None

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

    def set_patches(self, weight: list[tuple], bias: list[tuple], placed: PlacedLoras) -> None:
        """Replace the patches (ComfyUI's tuples) that run on top of the stored weight.

        Raises:
            ValueError: if a LoRA has the widths of another model, or makes the matrix larger.
        """
        if any(enlarges(value) for _, value, *_ in weight):
            raise ValueError(
                f"A control LoRA (Canny, Depth) on this model makes its '{self._name}' larger, "
                "which weights of Load Quantized FLUX cannot be. Load the model with Load "
                "Diffusion Model for it."
            )
        loras = [runtime_lora(patch) for patch in weight]
        for lora in loras:
            if lora is not None:
                lora.check_shape(self._name, self.out_features, self.in_features)
        beside = loras_beside(weight)
        self._patches = weight
        self._loras = [placed.place(lora) for lora in beside]
        as_dense = len(beside) < len(weight)
        self._dense_weight = DensePatches(f"{self._name}.weight", weight) if as_dense else None
        self._dense_bias = DensePatches(f"{self._name}.bias", bias) if bias else None

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """What the host calls to turn the stored bytes into a matrix, when it merges models."""
        return self.packed.dequantize(torch.float32).to(weight.device, copy=True)

    def patched_weight(self) -> Tensor:
        """The matrix [out, in] in bf16 with all patches, for nodes that write it to a file."""
        weight = self.packed.dequantize(torch.float32)
        patches = DensePatches(f"{self._name}.weight", self._patches)
        return patches.apply(weight).to(torch.bfloat16)

    def patched_bias(self) -> Tensor | None:
        """The bias [out] with all patches, in bf16."""
        bias = self._computing_bias()
        return bias.to(torch.bfloat16) if bias is not None else None

    def _computing_bias(self) -> Tensor | None:
        if self._dense_bias is None or self.bias is None:
            return self.bias
        return self._dense_bias.apply(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self._computing_bias()
        if self._dense_weight is not None:
            weight = self._dense_weight.apply(self.packed.dequantize(x.dtype)).to(x.dtype)
            return F.linear(x, weight, bias.to(x.dtype) if bias is not None else None)
        y = self.packed.linear(x, bias)
        for lora in self._loras:
            lora.add_to(y, x)
        return y

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # Saving nodes ask the network itself, and get what computes. The host asks the model around
        # it whenever it wants names, and gets what costs nothing: the stored bytes.
        is_saved = prefix == f"{self._name}."
        destination[f"{prefix}weight"] = self.patched_weight() if is_saved else self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.patched_bias() if is_saved else self.bias


class StoreEmbedding(_InStore, nn.Embedding):
    """An Embedding of the host's network over a store."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self._patched: Tensor | None = None

    @property
    def stored(self) -> Tensor:
        return self._store.plain[f"{self._name}.weight"]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The table [rows, width] with its patches: the host also reads it without `forward`."""
        return self.stored if self._patched is None else self._patched

    def set_patches(self, weight: list[tuple], bias: list[tuple], placed: PlacedLoras) -> None:
        """Replace the patches (ComfyUI's tuples) of the table; there is no bias."""
        dense = DensePatches(f"{self._name}.weight", weight)
        self._patched = dense.apply(self.stored) if weight else None

    def convert_weight(self, weight: Tensor, inplace: bool = False) -> Tensor:
        """As that of `StoreLinear`."""
        return self.stored.to(weight.device, torch.float32, copy=True)

    def patched_weight(self) -> Tensor:
        """The table in bf16 with all patches."""
        return self.weight.to(torch.bfloat16)

    def forward(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return F.embedding(input, self.weight).to(dtype=out_dtype)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.stored


StoreModule = StoreLinear | StoreEmbedding


class StoreOps(comfy.ops.manual_cast):
    """The host's operations with every Linear and Embedding computing from a store."""

    Linear = StoreLinear
    Embedding = StoreEmbedding


def loras_beside(patches: list[tuple]) -> list[RuntimeLora]:
    """The LoRAs that run beside a weight with these patches: all, or none if it must be dense."""
    loras = [runtime_lora(patch) for patch in patches]
    plain = [lora for lora in loras if lora is not None]
    return plain if len(plain) == len(loras) else []


def runtime_lora(patch: tuple) -> RuntimeLora | None:
    """A patch of ComfyUI as a LoRA of ComfyUI's own tensors, or None if it is not a plain LoRA on
    whole rows."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0:
        return None
    if function not in (None, comfy.utils.swap_scale_shift):
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if middle is not None or dora_scale is not None or reshape is not None:
        return None
    if offset is not None and offset[0] != 0:
        return None
    rows = slice(None) if offset is None else slice(offset[1], offset[1] + offset[2])
    scale = strength * (alpha / down.shape[0] if alpha is not None else 1.0)
    return RuntimeLora(down, up, scale, rows, function)


def enlarges(value: Any) -> bool:
    """Whether a patch pads its matrix first, as control LoRAs do for their picture's channels."""
    return isinstance(value, LoRAAdapter) and value.weights[5] is not None


def kind_of_patch(patch: tuple) -> str:
    """What a patch that is no plain LoRA is called."""
    _, value, strength_model, _, _ = patch
    if isinstance(value, list) or strength_model != 1.0:
        return "model merge"
    if isinstance(value, LoRAAdapter):
        return "LoRA of another shape" if value.weights[4] is None else "DoRA"
    if isinstance(value, WeightAdapterBase):
        return value.name
    return value[0] if len(value) == 2 else "diff"
