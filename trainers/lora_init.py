"""What the factors of a plain LoRA start with, where that is computed from the weights.

Shapes: W [out, in] is a Linear's matrix as it computes, r the rank, s the LoRA's scale. The base
never changes: a start whose product is not meant to act is taken off beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .changes import ChangedTensors
from .checks import require
from .flux import LinearView
from .load import BaseFlux, LoadedFlux, open_flux
from .lora_settings import Init, LoraSettings
from .low_rank import truncated_svd

Originals = Callable[[LinearView], Tensor]
"""The matrix [out, in] of a Linear as it was before it was quantized, in float32."""


def start_factors(
    init: Init, view: LinearView, rank: int, scale: float, originals: Originals | None
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r].

    pissa: the r largest singular values of W, shared by both (Meng et al. 2024). olora: the first
    columns of the QR of W (Büyükakyüz 2024). loftq: the nearest product of rank r to what
    quantization took from W (Li et al. 2023, one step, the quantized matrix as it is).
    """
    smaller = min(view.out_features, view.in_features)
    require(
        rank <= smaller,
        f"The start {init} gives at most as many ranks as a matrix has columns or rows: "
        f"{smaller} here, and the rank is {rank}. Lower the rank, or set init to gaussian.",
    )
    weight = view.dequantize(torch.float32)
    if init == "olora":
        q, _ = torch.linalg.qr(weight[:, :rank])  # those of W, without the others
        return q.T @ weight, q
    if init == "loftq":
        assert originals is not None
        weight = originals(view).to(weight.device) - weight
    u, s, v = truncated_svd(weight, rank)
    root = (s / scale).sqrt()
    return root[:, None] * v, u * root


def require_start(settings: LoraSettings, base: BaseFlux) -> None:
    """Raises ValueError if the weights that the start needs cannot be read."""
    if settings.init == "loftq":
        originals_of(base)


def originals_of(base: BaseFlux) -> Originals:
    """Where the weights of a model that is quantized can be read as they were.

    Raises:
        ValueError: if it is not quantized, or its file is gone, another one, or not known.
    """
    require(
        base.format != "bf16",
        "LoftQ makes up for what quantization took, and this model is in bf16: nothing was taken. "
        "Set init to pissa or gaussian, or load the model in another format.",
    )
    source = base.source if isinstance(base, LoadedFlux) else None
    if source is None:
        raise ValueError(
            "LoftQ needs the file that the model was quantized from, and that is not known. Load "
            "the model with Load Quantized FLUX, or set init to pissa or gaussian."
        )
    names, identity, _ = open_flux(Path(source.path))
    require(
        identity == source.identity,
        f"'{Path(source.path).name}' is not the file any more that this model was quantized from. "
        "Load the model again, or set init to gaussian.",
    )
    tensors = ChangedTensors(names, source.changes)

    def read(view: LinearView) -> Tensor:
        name = f"{view.source.name}.weight"
        require(
            tensors.packed_format(name) != base.format,
            f"LoftQ needs weights of more bits, and the file of this model holds '{name}' in "
            f"{base.format} already. Load one in bf16, or set init to pissa or gaussian.",
        )
        whole = tensors.read(name, torch.device("cpu")).to(torch.float32)
        return whole[view.source.rows]

    return read
