"""A LoRA file of FLUX.1 by the matrices that it changes, whatever its names and its kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .flux import FINAL_MODULATION
from .lora_names import (
    DIFFUSERS_OF,
    PARTS,
    SINGLE_QKV,
    block_zero,
    comfy_names,
    flux_module,
    in_block,
    is_second_magnitude,
    split_name,
    text_module,
)
from .lora_settings import Kind
from .low_rank import LowRank, hadamard_low_rank, kron_low_rank

_KINDS: dict[Kind, set[str]] = {
    "lora": {"down", "up"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    "lokr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
}
_NUM_DOUBLE, _NUM_SINGLE = 19, 38
"""Blocks of FLUX.1; models with other numbers share some of its names."""
_CONVOLUTIONS = {"mid", "reshape_weight", "lokr_t2", "hada_t1", "hada_t2"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """What a file adds to some rows of a matrix: a LoRA, LoKr or LoHa, perhaps as DoRA."""

    name: str
    """The matrix: FLUX's original module name, such as `double_blocks.0.img_attn.qkv`, or that of
    a text encoder after `clip_l.` or `t5xxl.`."""
    start: int = 0
    """The first row."""
    parts: Mapping[str, Tensor]
    """By the names of `split_name`: `down` [rank, in], `up` [rows, rank], `alpha`, `lokr_w1`, …;
    `magnitude` [rows, 1] is a DoRA's for diffusers, where `dora_scale` is ComfyUI's."""

    @property
    def kind(self) -> Kind:
        return next(kind for kind, names in _KINDS.items() if not names.isdisjoint(self.parts))

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the delta."""
        parts = self.parts
        if self.kind == "lora":
            return parts["up"].shape[0], parts["down"].shape[1]
        if self.kind == "loha":
            return parts["hada_w1_a"].shape[0], parts["hada_w1_b"].shape[1]
        first, second = (self._kron_shape(which) for which in ("lokr_w1", "lokr_w2"))
        return first[0] * second[0], first[1] * second[1]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.shape[0])

    @property
    def dora_scale(self) -> Tensor | None:
        """[rows, 1], or [1, in] where the norms are those of the columns."""
        return self.parts.get("dora_scale")

    @property
    def magnitudes(self) -> dict[str, Tensor]:
        """Those of a DoRA by their names, each [rows, 1] or [1, in]."""
        names = ("dora_scale", "magnitude")
        return {name: self.parts[name] for name in names if name in self.parts}

    def delta(self) -> Tensor:
        """What is added to the rows [rows, in], in float32; before the magnitudes of a DoRA."""
        if self.kind == "lokr":
            return self.scale * torch.kron(self._kron("lokr_w1"), self._kron("lokr_w2"))
        return self.low_rank().dense()

    def low_rank(self, rank: int = 0) -> LowRank:
        """The delta as two factors: exactly, or the nearest of at most `rank` if one is given.

        Raises:
            ValueError: if it is a LoKr and no rank is given.
        """
        if self.kind == "lokr":
            if not rank:
                raise ValueError(
                    f"'{self.name}' is a LoKr, which no LoRA equals exactly. Set a rank: 16 to 64 "
                    "is usual."
                )
            return kron_low_rank(self._kron("lokr_w1"), self._kron("lokr_w2"), rank, self.scale)
        parts = self.parts
        if self.kind == "lora":
            product = LowRank(down=parts["down"], up=parts["up"], scale=self.scale)
        else:
            pairs = ((parts[f"hada_{w}_b"], parts[f"hada_{w}_a"]) for w in ("w1", "w2"))
            factors = (LowRank(down=down, up=up) for down, up in pairs)
            product = hadamard_low_rank(*factors, scale=self.scale)
        return product.truncated(rank) if rank else product

    def squared_norm(self) -> float:
        """The sum of the squares of the delta."""
        if self.kind == "lokr":
            norms = (self._kron(which).double().norm() for which in ("lokr_w1", "lokr_w2"))
            return self.scale**2 * float(math.prod(norms)) ** 2
        return self.low_rank().squared_norm()

    @property
    def scale(self) -> float:
        """alpha / rank, as ComfyUI's `weight_adapter` has it: without alpha 1, and for a LoKr
        without decomposed factors 1."""
        names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        rank = next((self.parts[name].shape[0] for name in names if name in self.parts), None)
        alpha = self.parts.get("alpha")
        return 1.0 if alpha is None or rank is None else alpha.item() / rank

    def _kron(self, which: str) -> Tensor:
        whole = self.parts.get(which)
        return self.parts[f"{which}_a"] @ self.parts[f"{which}_b"] if whole is None else whole

    def _kron_shape(self, which: str) -> tuple[int, int]:
        if which in self.parts:
            rows, columns = self.parts[which].shape
            return rows, columns
        return self.parts[f"{which}_a"].shape[0], self.parts[f"{which}_b"].shape[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class FluxLora:
    """All that a LoRA file of FLUX.1 holds."""

    adapters: tuple[Adapter, ...]
    """Those of the transformer."""
    text: tuple[Adapter, ...] = ()
    """Those of CLIP-L and T5-XXL."""
    rest: Mapping[str, Tensor]
    """Other changes of FLUX's own modules (biases, norms, whole differences), under names that
    ComfyUI reads."""
    unknown: tuple[str, ...] = ()
    """Modules that FLUX.1 does not have."""


def parse_flux_lora(tensors: Mapping[str, Tensor], name: str = "") -> FluxLora:
    """Sort the tensors of a file called `name` by the matrices that they change, in float32.

    Raises:
        ValueError: if half of its modules or more are not FLUX.1's, two sets of tensors are for
            the same module, shapes are not FLUX.1's, or `up` matrices have biases.
    """
    biases = [key for key in tensors if split_name(key)[2] == "bias"]
    if biases:
        raise ValueError(
            f"The LoRA '{name}' has biases, first '{biases[0]}', as control LoRAs of Black Forest "
            "Labs and those trained with lora_bias of peft have. No other file can hold them: "
            "choose a LoRA without."
        )
    modules: dict[str, dict[str, str]] = {}
    unknown: dict[str, None] = {}
    for key in tensors:
        module, _, part = split_name(key)
        known = _known(module)
        part = "magnitude" if is_second_magnitude(key, tensors) else part
        if known is None or not part:
            unknown[module] = None
        elif part in modules.setdefault(known, {}):
            raise ValueError(
                f"The LoRA '{name}' has two tensors for '{known}': '{modules[known][part]}' and "
                f"'{key}'. Choose another file."
            )
        else:
            modules[known][part] = key
    is_of_another = any(flux_module(module) for module in unknown)  # one with more blocks
    if len(unknown) >= len(modules) or is_of_another:
        raise ValueError(
            f"The LoRA '{name}' was not made for FLUX.1: of its "
            f"{len(unknown) + len(modules)} modules {len(unknown)} are unknown, such as "
            f"{', '.join([*unknown][:3])}. Choose a LoRA of FLUX.1."
        )
    found: list[Adapter] = []
    rest: dict[str, Tensor] = {}
    for module, keys in modules.items():
        if keys.keys() == {"alpha"}:
            continue
        ours = _parts_of_adapter({part: tensors[key] for part, key in keys.items()}, module)
        if ours:
            found.append(_adapter(module, ours))
        rest |= comfy_names({key: tensors[key] for part, key in keys.items() if part not in ours})
    return FluxLora(
        adapters=tuple(adapter for adapter in found if not is_of_text(adapter)),
        text=tuple(adapter for adapter in found if is_of_text(adapter)),
        rest=rest,
        unknown=tuple(unknown),
    )


def is_of_text(adapter: Adapter) -> bool:
    """Whether it changes a text encoder."""
    return adapter.name.startswith(("clip_l.", "t5xxl."))


def swapped_halves(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA or LoHa with the halves of its rows exchanged, as between diffusers' final
    modulation and the original one."""
    of_rows = {"up", "hada_w1_a", "hada_w2_a", "dora_scale", "magnitude"}
    return {
        name: torch.cat(tensor.chunk(2)[::-1])
        if name in of_rows and tensor.shape[0] > 1
        else tensor
        for name, tensor in parts.items()
    }


def _known(module: str) -> str | None:
    """FLUX.1's name, diffusers' or the original one, or a text encoder's."""
    if text := text_module(module):
        return ".".join(text)
    known = flux_module(module)
    if known is None:
        return None
    _, index = block_zero(known)
    limit = _NUM_SINGLE if known.startswith("single_") else _NUM_DOUBLE
    return known if int(index or 0) < limit else None


def _parts_of_adapter(parts: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """Those that make up a LoRA, LoKr or LoHa of a Linear, if there is one, as matrices."""
    kinds = [names for names in _KINDS.values() if not names.isdisjoint(parts)]
    is_lokr_of_halves = module == FINAL_MODULATION[0] and _KINDS["lokr"] in kinds
    is_of_convolution = not _CONVOLUTIONS.isdisjoint(parts)
    if len(kinds) != 1 or is_lokr_of_halves or is_of_convolution:
        return {}
    names = kinds[0] | {"alpha", "dora_scale", "magnitude"}
    ours = {part: tensor.float() for part, tensor in parts.items() if part in names}
    for part, tensor in ours.items():
        if part != "alpha":  # convolutions of 1x1 are matrices, peft's magnitudes have no columns
            ours[part] = tensor.reshape(tensor.shape[0], -1)
    return ours


def _adapter(module: str, parts: dict[str, Tensor]) -> Adapter:
    """`module` is diffusers' name, the original one, or a text encoder's."""
    if module == FINAL_MODULATION[0]:
        return _fitting(Adapter(name=FINAL_MODULATION[1], parts=swapped_halves(parts)), 2)
    zero, index = block_zero(module)
    if zero == SINGLE_QKV:
        adapter = Adapter(name=module.removesuffix("_qkv"), parts=parts)
        return _fitting(adapter, 3)
    if zero in PARTS:
        return _fitting(Adapter(name=module, parts=parts), PARTS[zero][-1][2])
    for matrix, fused in PARTS.items():
        for part, start, stop in fused:
            if zero == part:
                adapter = Adapter(name=in_block(matrix, index), parts=parts)
                width = adapter.shape[1]
                return _fitting(dataclasses.replace(adapter, start=start * width), stop - start)
    original = next((name for name, theirs in DIFFUSERS_OF.items() if theirs == zero), zero)
    return _fitting(Adapter(name=in_block(original, index), parts=parts), 0)


def _fitting(adapter: Adapter, num_widths: int) -> Adapter:
    """Raises ValueError if factors do not fit each other, or a matrix that has `num_widths` times
    as many rows as columns does not have them here."""
    parts = adapter.parts
    pairs = (("up", "down"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
    pairs += (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))
    for left, right in pairs:
        if left in parts and parts[left].shape[1] != parts[right].shape[0]:
            raise ValueError(
                f"The shapes of a LoRA do not fit together: '{adapter.name}' has '{left}' "
                f"{[*parts[left].shape]} and '{right}' {[*parts[right].shape]}. Choose another "
                "file."
            )
    rows, columns = adapter.shape
    if num_widths and rows != num_widths * columns:
        raise ValueError(
            f"The LoRA does not fit FLUX.1: it changes {rows} rows of {columns} of "
            f"'{adapter.name}', where {num_widths * columns} are needed. Choose a LoRA of FLUX.1."
        )
    return adapter
