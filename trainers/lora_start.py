"""A LoRA file of any format as what a training goes on from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .checks import require
from .flux_lora import Adapter, FluxLora, parse_flux_lora
from .lora_export import exported
from .lora_file import read_lora
from .lora_names import DIFFUSERS_OF, PARTS, block_zero, in_block
from .lora_settings import Kind, LoraSettings


@dataclass(frozen=True, kw_only=True, eq=False)
class StartLora:
    """The layers of a LoRA file by diffusers' names."""

    kind: Kind
    dora: bool
    modules: Mapping[str, Mapping[str, Tensor]]
    """By layer its tensors, named as in a state, alphas among them."""
    ranks: Mapping[str, int]
    rank: int
    """The highest."""
    alpha: float
    """Of a layer that has it."""
    num_left: int
    """Its layers of text encoders, which are not trained."""

    def scale(self, module: str) -> float:
        """What the product of a layer's factors is multiplied by."""
        return self.modules[module]["alpha"].item() / self.ranks[module]


def settings_from(path: Path, settings: LoraSettings) -> LoraSettings:
    """The settings of a training that goes on from the file: REPLACED_BY_A_FILE are its own.

    Raises:
        ValueError: if it is missing or damaged, or nothing that can be trained here.
    """
    start = _parsed(path, _hash(path))
    return dataclasses.replace(
        settings,
        kind=start.kind,
        rank=start.rank,
        alpha=None if start.alpha == start.rank else start.alpha,
        dora=start.dora,
        rslora=False,
        init="gaussian",
        start_from=str(path),
        start_hash=_hash(path),
    )


def read_start(settings: LoraSettings) -> StartLora:
    """The file that a training with these settings goes on from.

    Raises:
        ValueError: if it is gone, was changed, or cannot be trained here.
    """
    path = Path(settings.start_from)
    require(
        _hash(path) == settings.start_hash,
        f"The LoRA to start from, '{path.name}', was changed since this training was set up. Put "
        "the old file back, or choose it again for a new run.",
    )
    return _parsed(path, settings.start_hash)


def _hash(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        raise ValueError(
            f"The LoRA to start from, '{path}', is not there. Put it back, or choose another."
        ) from None
    return _hash_of_version(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _hash_of_version(path: Path, num_bytes: int, mtime_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=2)
def _parsed(path: Path, content: str) -> StartLora:
    """What is in the file with these bytes."""
    lora = parse_flux_lora(read_lora(path), path.name)
    require(
        bool(lora.adapters),
        f"The LoRA '{path.name}' has no layer of FLUX.1's transformer. Choose another file.",
    )
    require(
        not lora.rest,
        f"The LoRA '{path.name}' changes more than layers, such as '{next(iter(lora.rest), '')}', "
        "and cannot be trained further. Choose another file.",
    )
    kinds: set[Kind] = {adapter.kind for adapter in lora.adapters}
    doras = {adapter.dora_scale is not None for adapter in lora.adapters}
    require(
        len(kinds) == len(doras) == 1 and not (doras == {True} and kinds != {"lora"}),
        f"The LoRA '{path.name}' has layers of several kinds ({', '.join(sorted(kinds))}, with and "
        "without DoRA), which cannot be trained as one. Choose another file.",
    )
    kind: Kind = kinds.pop()
    modules = _plain(lora) if kind == "lora" else dict(_whole(a, path.name) for a in lora.adapters)
    ranks = {name: _rank(parts) for name, parts in modules.items()}
    widest = max(ranks, key=lambda name: ranks[name])
    return StartLora(
        kind=kind,
        dora=doras.pop(),
        modules=modules,
        ranks=ranks,
        rank=ranks[widest],
        alpha=modules[widest]["alpha"].item(),
        num_left=len(lora.text),
    )


def _plain(lora: FluxLora) -> dict[str, dict[str, Tensor]]:
    """By diffusers' layer: fused matrices are taken apart, exactly."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in exported(dataclasses.replace(lora, text=()), "diffusers").items():
        module, part = _split(name.removeprefix("transformer."))
        modules.setdefault(module, {})[_PARTS.get(part, part)] = tensor
    return modules


_PARTS = {"lora_magnitude_vector": "magnitude"}


def _split(name: str) -> tuple[str, str]:
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"):
        if name.endswith(f".{part}"):
            return name.removesuffix(f".{part}"), part
    raise AssertionError(name)


def _whole(adapter: Adapter, file_name: str) -> tuple[str, dict[str, Tensor]]:
    """A LoKr or LoHa under diffusers' name of its layer, w1 of a LoKr as one matrix."""
    zero, index = block_zero(adapter.name)
    width = adapter.shape[1]
    if zero in PARTS:
        rows = {(start * width, stop * width): name for name, start, stop in PARTS[zero]}
        layer = rows.get((adapter.rows.start, adapter.rows.stop))
    else:
        layer = DIFFUSERS_OF[zero]
    if layer is None:
        raise ValueError(
            f"The LoRA '{file_name}' is a {adapter.kind} on the fused matrix '{adapter.name}', and "
            "only those on q, k, v and mlp apart are trained further here. Resize it to a plain "
            "LoRA with Export LoRA and start from that."
        )
    parts = dict(adapter.parts)
    if "lokr_w1_a" in parts:
        w1 = parts.pop("lokr_w1_a") @ parts.pop("lokr_w1_b")
        parts["lokr_w1"] = w1 if "lokr_w2_a" in parts else adapter.scale * w1
    scale = 1.0 if "lokr_w2" in parts else adapter.scale  # that of a decomposed w1 is in it
    parts["alpha"] = torch.tensor(scale * _rank(parts))
    return in_block(layer, index), parts


def _rank(parts: Mapping[str, Tensor]) -> int:
    """Of a layer; that of a LoKr of two whole factors is 1 by agreement."""
    names = ("lora_A.weight", "hada_w1_b", "lokr_w2_b")
    return next((len(parts[name]) for name in names if name in parts), 1)
