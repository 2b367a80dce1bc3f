"""Files into a weight store, tensor by tensor; FLUX in original and diffusers names."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .changes import Change, Tensors
from .checks import require
from .config import STREAMING
from .devices import give_back_memory, require_format_on
from .flux import (
    FINAL_MODULATION,
    FluxConfig,
    is_block_matrix,
    norm_sources,
    original_linears,
    swap_halves,
)
from .formats import FORMATS
from .frozen import FrozenLora
from .packed_copy import CopyKey, PackedCopies
from .packed_weight import PackedWeight
from .store import Weights, WeightStore
from .tensor_files import TensorFiles, model_files

ESSENTIAL_NAMES = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight")
"""The tensors that tell the sizes of a FLUX.1."""


@dataclass(frozen=True)
class BaseFlux:
    """A FLUX in memory that LoRAs are trained on."""

    store: Weights
    config: FluxConfig
    identity: str
    path: str
    """Of its file or folder; empty where that is not known."""
    format: str
    """What its block matrices are kept in, a name of `formats.FORMATS`."""
    frozen: tuple[FrozenLora, ...] = ()
    """LoRAs that it computes with, and that a new one is trained on top of."""
    assistant: tuple[FrozenLora, ...] = ()
    """LoRAs that it computes with while it trains and at no other time."""


@dataclass(frozen=True)
class FluxSource:
    """What a model in a store was packed from."""

    path: str
    identity: str
    """Of the file or folder at `path`."""
    changes: tuple[Change, ...] = ()
    """What was made of its tensors."""


@dataclass(frozen=True)
class LoadedFlux(BaseFlux):
    """A FLUX in a store of its own."""

    store: WeightStore
    source: FluxSource | None = None
    """Where its numbers can be read again as they were before they were packed."""


def load_flux(
    path: str | Path,
    *,
    format: str,
    device: torch.device | str = "cpu",
    quantize_on: torch.device | str = "cpu",
    copies: PackedCopies | None = None,
    streaming: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedFlux:
    """Read a FLUX file or diffusers folder into a store on `device`, its block matrices packed in
    `format` one after the other on `quantize_on`.

    Args:
        copies: where what had to be quantized is kept, so that the next load only reads it.
        streaming: a value of config.STREAMING. With "disk" the matrices of the blocks stay in the
            copy, and the rest is on the CPU first.

    Raises:
        ValueError: if a file is damaged, is not a FLUX.1, or lacks tensors, or there is no copy to
            stream from.
    """
    require_format(format)
    require(
        streaming in STREAMING,
        f"Unknown block streaming '{streaming}'. Choose one of: {', '.join(STREAMING)}.",
    )
    path = Path(path)
    names, files, config = _open(path)
    formats = tensor_formats(names.shapes, config, format)
    key = CopyKey(path, files.identity(), format)
    if streaming == "disk":
        devices = (torch.device(quantize_on), torch.device("cpu"))
        pack = partial(pack_all, names, formats, devices, on_progress)
        store = _open_copy(copies, key, pack, on_progress)
    else:
        store = load_store(
            names,
            formats,
            key,
            num_bytes=files.num_bytes,
            device=device,
            quantize_on=quantize_on,
            copies=copies,
            on_progress=on_progress,
        )
    store.streaming = streaming
    source = FluxSource(str(path), key.identity)
    return LoadedFlux(store, config, key.identity, str(path), format, source=source)


def _open_copy(
    copies: PackedCopies | None,
    key: CopyKey,
    pack: Callable[[], WeightStore],
    on_progress: Callable[[int, int], None],
) -> WeightStore:
    """The store whose blocks stay in the copy, which is made if there is none."""
    store = copies.read_without_blocks(key, on_progress) if copies else None
    if store is not None:
        return store
    if copies is None or not copies.writes:
        raise ValueError(
            "Blocks can only be streamed from disk out of the model's quantized copy, and there is "
            "none. Turn keep_copy on, or set block_streaming to ram."
        )
    copies.write(key, pack(), on_progress)
    store = copies.read_without_blocks(key, on_progress)
    if store is None:
        raise ValueError(
            "Blocks can only be streamed from disk out of the model's quantized copy, and it could "
            "not be written to this disk. Free some space on it, or set block_streaming to ram."
        )
    return store


@dataclass(frozen=True)
class FluxFile:
    """What the headers of a FLUX file tell."""

    config: FluxConfig
    format: str | None
    """The format in which its block matrices are packed already, if the store has it too."""


def inspect_flux(path: str | Path) -> FluxFile:
    """Read the headers of a FLUX file or diffusers folder.

    Raises:
        ValueError: if a file is damaged, is not a FLUX.1, or lacks tensors.
    """
    names, _, config = _open(Path(path))
    return FluxFile(config, names.packed_format("double_blocks.0.img_mlp.0.weight"))


def open_flux(path: Path) -> tuple[Tensors, str, FluxConfig]:
    """The tensors of a FLUX file or diffusers folder, what tells it from others, and its sizes.

    Raises:
        ValueError: if a file is damaged, is not a FLUX.1, or lacks tensors.
    """
    names, files, config = _open(path)
    return names, files.identity(), config


def _open(path: Path) -> tuple[_Names, TensorFiles, FluxConfig]:
    files = TensorFiles(model_files(path))
    config = flux_config(files.shapes, path.name)
    return files if "img_in.weight" in files else _DiffusersNames(files), files, config


def require_format(format: str) -> None:
    """Raises ValueError if there is no such format."""
    require(format in FORMATS, f"Unknown format '{format}'. Choose one of: {', '.join(FORMATS)}.")


class _DiffusersNames:
    """Tensors of a diffusers file under the original names; q, k, v, mlp are fused on reading."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.parts = _diffusers_parts(files.shapes)
        self.shapes = _fused_shapes(files.shapes, self.parts)

    def read(self, name: str, device: torch.device) -> Tensor:
        parts = [self.files.read(part, device) for part in self.parts[name]]
        tensor = torch.cat(parts, dim=0) if len(parts) > 1 else parts[0]
        return swap_halves(tensor) if name.startswith(FINAL_MODULATION[1]) else tensor

    def packed_format(self, name: str) -> str | None:
        formats = {self.files.packed_format(part) for part in self.parts[name]}
        return formats.pop() if len(formats) == 1 else None

    def read_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """Blocks do not cross rows, so the bytes of q, k, v and mlp follow each other."""
        parts = [self.files.read_packed(part) for part in self.parts[name]]
        data, scales = zip(*parts, strict=True)
        return torch.cat(data), torch.cat(scales)


_Names = TensorFiles | _DiffusersNames


def _diffusers_parts(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """Original tensor name -> diffusers tensor names, for those that are all there."""
    if "x_embedder.weight" not in shapes:
        return {}
    config = FluxConfig(
        hidden_size=shapes["x_embedder.weight"][0],
        depth=len({n.split(".")[1] for n in shapes if n.startswith("transformer_blocks.")}),
        depth_single=len({n.split(".")[1] for n in shapes if n.startswith("single_transformer")}),
        in_channels=shapes["x_embedder.weight"][1],
        context_dim=0,
        vector_dim=0,
        guidance="time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    )
    parts: dict[str, list[str]] = {}
    for theirs, ours in original_linears(config).items():
        for end in ("weight", "bias"):
            parts[f"{theirs}.{end}"] = [f"{name}.{end}" for name in ours]
    for ours, theirs in norm_sources(config).items():
        parts[f"{theirs}.scale"] = [f"{ours}.weight"]
    return {name: sources for name, sources in parts.items() if all(s in shapes for s in sources)}


def _fused_shapes(
    shapes: dict[str, tuple[int, ...]], parts: dict[str, list[str]]
) -> dict[str, tuple[int, ...]]:
    return {
        name: (sum(shapes[source][0] for source in sources), *shapes[sources[0]][1:])
        for name, sources in parts.items()
    }


def flux_config(shapes: dict[str, tuple[int, ...]], file_name: str) -> FluxConfig:
    """The sizes of the FLUX whose tensors have these shapes, by original or diffusers' names.

    Raises:
        ValueError: if they make no whole FLUX.1; it names `file_name`.
    """
    if any(name.startswith("double_stream_modulation_img.") for name in shapes):
        raise ValueError(
            f"'{file_name}' is a FLUX.2 model, which is not known here. "
            "Choose a FLUX.1 file such as flux1-dev.safetensors."
        )
    if "img_in.weight" not in shapes:
        shapes = _fused_shapes(shapes, _diffusers_parts(shapes))
    absent = first_missing(ESSENTIAL_NAMES, shapes)
    if absent is not None:
        raise ValueError(
            f"'{file_name}' is not a FLUX.1 model: it has no '{absent}'. "
            "Choose a FLUX.1 file such as flux1-dev.safetensors."
        )
    config = FluxConfig.from_shapes(shapes)
    missing = first_missing(needed_names(config), shapes)
    if missing is not None:
        raise ValueError(
            f"'{file_name}' is an incomplete FLUX.1 model: '{missing}' is missing. "
            "Download it again, or choose another file."
        )
    return config


def first_missing(needed: Iterable[str], shapes: Container[str]) -> str | None:
    return next((name for name in needed if name not in shapes), None)


def needed_names(config: FluxConfig) -> list[str]:
    """The tensors of a whole network, by their original names."""
    linears = original_linears(config)
    weights = [f"{name}.{end}" for name in linears for end in ("weight", "bias")]
    return weights + [f"{name}.scale" for name in norm_sources(config).values()]


def tensor_formats(
    shapes: Mapping[str, tuple[int, ...]], config: FluxConfig, format: str
) -> dict[str, str | None]:
    """What each tensor is kept in: the block matrices in `format`, other matrices in bf16."""
    formats: dict[str, str | None] = {}
    for name in needed_names(config):
        shape = shapes[name]
        formats[name] = format if is_block_matrix(name, shape) else "bf16"
        if len(shape) != 2:
            formats[name] = None
    return formats


def load_store(
    names: _Names,
    formats: dict[str, str | None],
    key: CopyKey,
    *,
    num_bytes: int,
    device: torch.device | str = "cpu",
    quantize_on: torch.device | str = "cpu",
    copies: PackedCopies | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightStore:
    """Pack tensors one after the other, or read what a load before this one kept under `key`.

    Args:
        formats: by name what a matrix is kept in, or None for a plain tensor.
        num_bytes: of the source; a small one gets no copy.

    Raises:
        ValueError: if a format cannot hold a matrix, or a device not a format.
    """
    for format in {format for format in formats.values() if format}:
        require_format_on(format, device)
    if copies and not (_quantizes(names, formats) and copies.is_worthwhile(num_bytes)):
        copies = None
    store = copies.read(key, torch.device(device), on_progress) if copies else None
    if store is None:
        devices = (torch.device(quantize_on), torch.device(device))
        store = pack_all(names, formats, devices, on_progress)
        if copies and copies.writes:
            copies.write(key, store, on_progress)
    return store


def _quantizes(names: _Names, formats: dict[str, str | None]) -> bool:
    """Whether a load computes anything: not for bf16, nor where the file has the bytes already."""
    return any(
        format not in (None, "bf16") and names.packed_format(name) != format
        for name, format in formats.items()
    )


def pack_all(
    names: Tensors,
    formats: dict[str, str | None],
    devices: tuple[torch.device, torch.device],
    on_progress: Callable[[int, int], None],
) -> WeightStore:
    """Pack one tensor after the other, on the first device, and keep it on the second; `formats`
    names those that are read, None for what stays plain."""
    quantize_on, device = devices
    packed: dict[str, PackedWeight] = {}
    plain: dict[str, Tensor] = {}
    # Outside inference mode, in which the host runs its nodes: see packed_weight._FrozenLinear.
    with torch.inference_mode(False), torch.no_grad():
        for done, (name, format) in enumerate(formats.items()):
            if format is None:
                plain[name] = names.read(name, quantize_on).to(device, torch.bfloat16)
            else:
                packed[name] = _pack(names, name, format, quantize_on)
                packed[name].to(device)
                give_back_memory()
            on_progress(done + 1, len(formats))
    return WeightStore(packed, plain)


def _pack(names: Tensors, name: str, format: str, quantize_on: torch.device) -> PackedWeight:
    if names.packed_format(name) == format:
        return PackedWeight(format, *names.read_packed(name), names.shapes[name][1])
    return PackedWeight.pack(names.read(name, quantize_on), format)
