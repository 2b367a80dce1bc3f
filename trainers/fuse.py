"""A FLUX read again tensor by tensor, with LoRAs fused into it, and packed anew.

What is read are the numbers of its file where that is known, never those that were packed: they are
packed once, as without LoRAs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .changes import Change, ChangedTensors, Tensors
from .flux import FluxConfig
from .load import FluxSource, LoadedFlux, open_flux, pack_all, tensor_formats
from .memory import store_bytes
from .store import Weights

_COPIES = 4
"""Float32 copies of the largest matrix that are alive at once: itself, what a LoRA comes to, the
result, and what packing makes of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """A FLUX whose tensors can be read again."""

    tensors: Tensors
    config: FluxConfig
    identity: str
    """Of the model with these tensors."""
    format: str
    """What its block matrices were kept in, a name of `formats.FORMATS`."""
    source: FluxSource | None = None
    """The file that they are of, if there is one."""


class WeightTensors:
    """The tensors of weights in memory: what they compute with."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        matrices = {name: tuple(matrix.shape) for name, matrix in weights.packed.items()}
        self.shapes = matrices | {name: tuple(one.shape) for name, one in weights.plain.items()}

    def read(self, name: str, device: torch.device) -> Tensor:
        matrix = self._weights.packed.get(name)
        tensor = self._weights.plain[name] if matrix is None else matrix.dequantize(torch.float32)
        return tensor.to(device, copy=True)

    def packed_format(self, name: str) -> str | None:
        return self._weights.packed[name].format

    def read_packed(self, name: str) -> tuple[Tensor, Tensor | None]:
        data, scale = self._weights.packed[name].fetch()
        return data.to("cpu", copy=True), scale.to("cpu", copy=True) if scale is not None else None


def origin_of(loaded: LoadedFlux) -> Origin:
    """What a loaded FLUX was made of: its file with the LoRAs that were fused into it since, or,
    where there was no file, what it computes with.

    Raises:
        ValueError: if the file is gone, or another one now.
    """
    source = loaded.source
    return Origin(
        tensors=WeightTensors(loaded.store)
        if source is None
        else ChangedTensors(_open_again(source), source.changes),
        config=loaded.config,
        identity=loaded.identity,
        format=loaded.format,
        source=source,
    )


def _open_again(source: FluxSource) -> Tensors:
    path = Path(source.path)
    if not path.exists():
        raise ValueError(
            f"The file '{path}' that this MODEL was loaded from is gone, and LoRAs are fused into "
            "its numbers, not into those that were packed. Put it back, or load another model."
        )
    tensors, identity, _ = open_flux(path)
    if identity != source.identity:
        raise ValueError(
            f"The file '{path}' was changed since this MODEL was loaded from it. Load the model "
            "again: in ComfyUI, press Free Model and Node Cache, and queue again."
        )
    return tensors


def with_change(origin: Origin, change: Change) -> Origin:
    """The same FLUX with some of its tensors changed."""
    source, text = origin.source, f"{origin.identity} {change.fingerprint}"
    if source is not None:
        source = dataclasses.replace(source, changes=(*source.changes, change))
    return dataclasses.replace(
        origin,
        tensors=ChangedTensors(origin.tensors, (change,)),
        identity=hashlib.sha256(text.encode()).hexdigest(),
        source=source,
    )


def pack_flux(
    origin: Origin,
    *,
    format: str,
    device: torch.device,
    quantize_on: torch.device,
    streaming: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedFlux:
    """A FLUX in a store of its own on `device`, its block matrices packed in `format` one after the
    other on `quantize_on`. Those that lie in this format already, and are not changed, keep their
    bytes.

    Raises:
        ValueError: if a tensor cannot be read or packed.
    """
    formats = tensor_formats(origin.tensors.shapes, origin.config, format)
    store = pack_all(origin.tensors, formats, (quantize_on, device), on_progress)
    store.streaming = streaming
    # No path: the file holds another model.
    return LoadedFlux(store, origin.config, origin.identity, "", format, source=origin.source)


def require_memory(origin: Origin, format: str, free_bytes: int) -> None:
    """Raises ValueError if the packed model, and the work on its largest matrix, do not fit."""
    needed = store_bytes(origin.config, format) + working_bytes(origin)
    if needed > free_bytes:
        raise ValueError(
            f"Fusing into {format} takes {needed / 1e9:.1f} GB of memory, and "
            f"{free_bytes / 1e9:.1f} are free. Choose a smaller format, close other programs, or "
            "leave the LoRA beside the model, which takes no more memory than its file."
        )


def working_bytes(origin: Origin) -> int:
    """What the work on one matrix takes at most."""
    return max(_COPIES * 4 * torch.Size(shape).numel() for shape in origin.tensors.shapes.values())
