"""A FLUX as one file in the original names, written matrix by matrix."""

from __future__ import annotations

import datetime
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .files import write_atomically
from .flux import is_block_matrix
from .fuse import Origin
from .load import needed_names
from .tensor_files import data_layout, write_header

FILE_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
"""By name, what the block matrices are written in; with fp8 all else is bf16."""
_HASH = "modelspec.hash_sha256"


def save_flux(
    path: Path,
    origin: Origin,
    *,
    dtype: str,
    title: str,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write a FLUX as safetensors under the names of black-forest-labs' files, which ComfyUI and
    diffusers load; tensors are read and changed on `device`. The file is whole or not there.

    Raises:
        ValueError: if a tensor cannot be read or held by `dtype`, or the disk is full.
    """
    dtypes = _tensor_dtypes(origin, FILE_DTYPES[dtype])
    shapes = {name: origin.tensors.shapes[name] for name in dtypes}
    header = data_layout([(name, dtypes[name], shape) for name, shape in shapes.items()])
    num_bytes = max(entry["data_offsets"][1] for entry in header.values())
    metadata = _metadata(origin, title)

    def write_to(temporary: Path) -> None:
        _require_room(temporary.parent, num_bytes)
        with temporary.open("wb") as file:
            write_header(file, header, metadata)
            digest = hashlib.sha256()
            for done, name in enumerate(header):
                data = _bytes_of(_read(origin, name, dtypes[name], device))
                digest.update(data)
                file.write(data)
                on_progress(done + 1, len(header))
            # The hash is known now, and as long as the one that held its place.
            file.seek(0)
            write_header(file, header, metadata | {_HASH: f"0x{digest.hexdigest()}"})

    write_atomically(path, write_to)


def _tensor_dtypes(origin: Origin, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Of every tensor; wide elements first, as in safetensors' own files, so that all are
    aligned."""
    rest = torch.bfloat16 if dtype.itemsize == 1 else dtype
    shapes = origin.tensors.shapes
    names = needed_names(origin.config)
    dtypes = {n: dtype if is_block_matrix(n, shapes[n]) else rest for n in names}
    return dict(sorted(dtypes.items(), key=lambda item: -item[1].itemsize))


def _read(origin: Origin, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    tensor = origin.tensors.read(name, device)
    # Torch turns what is beyond the largest number of fp8 into nan, and of fp16 into inf.
    if float(tensor.abs().amax()) > torch.finfo(dtype).max:
        raise ValueError(
            f"'{name}' of this MODEL has values above {torch.finfo(dtype).max:g}, the largest that "
            f"{str(dtype).removeprefix('torch.')} holds. Save the model in bf16."
        )
    return tensor.to(dtype)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _metadata(origin: Origin, title: str) -> dict[str, str]:
    """In the modelspec convention; the hash is one of the same length as the true one."""
    variant = "dev" if origin.config.guidance else "schnell"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"flux-1-{variant}",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        _HASH: f"0x{hashlib.sha256().hexdigest()}",
        "atelier.identity": origin.identity,
    }
    if origin.source is not None:
        metadata["atelier.fused_into"] = Path(origin.source.path).name
    return metadata


def _require_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"The model file takes {num_bytes / 1e9:.1f} GB, and the disk of {folder} has "
            f"{free / 1e9:.1f} GB free. Free some space, or save it as fp8."
        )
