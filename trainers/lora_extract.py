"""A LoRA out of two models of one kind: what was changed between them, matrix by matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import require
from .flux_lora import Adapter, FluxLora
from .load import BaseFlux
from .low_rank import low_rank_of, squared_norm

_TOLD = {
    "guidance": "{a} guidance embedding",
    "hidden_size": "a width of {number}",
    "depth": "{number} double blocks",
    "depth_single": "{number} single blocks",
    "in_channels": "{number} input channels",
    "context_dim": "embeddings of T5 of width {number}",
    "vector_dim": "embeddings of CLIP-L of width {number}",
}
"""The fields of `FluxConfig` in words."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """The LoRA, and what it leaves out."""

    lora: FluxLora
    kept: float
    """The share of the squared difference of all matrices that the LoRA holds, 0 to 1."""
    num_others: int
    """How many biases and norms differ, which no LoRA holds."""


def extract_lora(
    tuned: BaseFlux,
    base: BaseFlux,
    *,
    rank: int,
    energy: float,
    on_progress: Callable[[int, int], None],
) -> Extraction:
    """The nearest LoRA (SVD) to the difference of two models, LoRAs that they carry among it.

    Each matrix has at most `rank`, and no more than it needs to keep the share `energy` of its
    squared difference. One matrix is unpacked at a time.

    Raises:
        ValueError: if their configurations are different, or they do not differ.
    """
    require(
        tuned.config == base.config,
        "A LoRA is the difference of two MODELs of one kind, and these are not: model has "
        f"{_told(tuned, base)}, model_base {_told(base, tuned)}. Choose the model that the other "
        "was made from.",
    )
    adapters, total, kept = [], 0.0, 0.0
    names = [*tuned.store.packed]
    for done, name in enumerate(names):
        module = name.removesuffix(".weight")
        difference = _matrix(tuned, module) - _matrix(base, module).to(tuned.store.device)
        squares = squared_norm(difference)
        if squares:
            product = low_rank_of(difference, rank, energy)
            total, kept = total + squares, kept + product.squared_norm()
            parts = {"down": product.down, "up": product.up}
            adapters.append(
                Adapter(name=module, parts={**parts, "alpha": torch.tensor(float(product.rank))})
            )
        on_progress(done + 1, len(names))
    require(
        bool(adapters),
        "The two MODELs have the same matrices, so there is no LoRA in their difference. Connect "
        "the changed one to model, and the one it was made from to model_base.",
    )
    plain = (tuned.store.plain, base.store.plain)
    others = [name for name in plain[0] if not torch.equal(*(one[name].cpu() for one in plain))]
    return Extraction(
        lora=FluxLora(adapters=tuple(adapters), rest={}),
        kept=min(kept / total, 1.0),
        num_others=len(others),
    )


def _told(model: BaseFlux, other: BaseFlux) -> str:
    """What of a model's configuration is not the other's."""
    ours, theirs = (dataclasses.asdict(one.config) for one in (model, other))
    return ", ".join(
        words.format(number=ours[field], a="a" if ours[field] else "no")
        for field, words in _TOLD.items()
        if ours[field] != theirs[field]
    )


def _matrix(model: BaseFlux, module: str) -> Tensor:
    """In float32, with the LoRAs that the model carries."""
    matrix = model.store.packed[f"{module}.weight"].dequantize(torch.float32)
    for lora in model.frozen:
        if lora.name == module:
            whole = lora.ready(matrix.device, torch.float32)
            matrix[lora.start : lora.start + len(lora.up)] += whole.up @ whole.down
    return matrix
