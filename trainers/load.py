"""FLUX files into a weight store, tensor by tensor: original and diffusers names, bf16 and fp8."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .flux import FINAL_MODULATION, FluxConfig, norm_sources, original_linears, swap_halves
from .formats import FORMATS
from .store import PackedWeight, WeightStore

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_SAMPLE_BYTES = 4096
_SAMPLED_TENSOR_BYTES = 4 * _SAMPLE_BYTES
"""Tensors from this size on tell one model from another: every matrix, also of a small model."""
_SCALE_NAMES = ("scale_weight", "weight_scale")
"""How ComfyUI's fp8 files call the factor of a `weight`, in older and newer ones."""


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors file: where its bytes lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFiles:
    """The tensors of one or several safetensors files by name, read on demand.

    Bytes are read at header offsets into one reused buffer: a memory-mapped file would stay in the
    resident set. A prefix that ComfyUI checkpoints put before the network's names is removed.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        self._buffer = bytearray()
        digest = hashlib.sha256()
        for path in paths:
            header, data_start = _read_header(path)
            digest.update(json.dumps(header, sort_keys=True).encode())
            for name, info in header.items():
                if name != "__metadata__":
                    self._entries[_strip_prefix(name)] = _entry(path, info, data_start)
        self._header_digest = digest
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str, device: torch.device) -> Tensor:
        """A fresh bf16 tensor on `device`, an fp8 one multiplied by its scale."""
        raw = self._view(name)
        for end in _SCALE_NAMES:
            scale_name = name.removesuffix("weight") + end
            if scale_name in self._entries:
                raw = raw.float()  # a copy: the buffer is used again
                raw = raw * self._view(scale_name).float()
        return raw.to(device=device, dtype=torch.bfloat16, copy=True)

    def _view(self, name: str) -> Tensor:
        """A tensor as it is in the file, until the next one is read."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(
                f"The tensor '{name}' in '{entry.path.name}' has the type {entry.dtype}. "
                "Use a file in bf16, fp16, fp32 or fp8."
            )
        if len(self._buffer) < entry.num_bytes:
            self._buffer = bytearray(entry.num_bytes)
        view = memoryview(self._buffer)[: entry.num_bytes]
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(view) != entry.num_bytes:
                raise ValueError(f"The file '{entry.path.name}' is cut short: download it again.")
        return torch.frombuffer(view, dtype=dtype).view(entry.shape)

    def identity(self) -> str:
        """SHA-256 over the headers and fixed samples of every tensor but the smallest."""
        digest = self._header_digest.copy()
        for name in sorted(self._entries):
            entry = self._entries[name]
            if entry.num_bytes >= _SAMPLED_TENSOR_BYTES:
                with entry.path.open("rb") as file:
                    for part in range(4):
                        file.seek(entry.start + part * (entry.num_bytes - _SAMPLE_BYTES) // 3)
                        digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def _strip_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _entry(path: Path, info: dict, data_start: int) -> _Entry:
    begin, end = info["data_offsets"]
    return _Entry(path, info["dtype"], tuple(info["shape"]), data_start + begin, end - begin)


def _read_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the offset of its data."""
    wrong = ValueError(
        f"'{path.name}' is not a whole safetensors file. "
        "Choose a .safetensors file, and download it again if it is one."
    )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100 << 20):
                raise wrong
            header = json.loads(file.read(length))
            data_start = 8 + length
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError):
        raise wrong from None
    ends = [info["data_offsets"][1] for key, info in header.items() if key != "__metadata__"]
    if size < data_start + max(ends, default=0):
        raise ValueError(f"The file '{path.name}' is cut short: download it again.")
    return header, data_start


def model_files(path: Path) -> list[Path]:
    """The safetensors files of a model: the file itself, or those of a diffusers folder.

    Raises:
        ValueError: if `path`, or a shard that its index names, is missing, or there is no file.
    """
    if not path.exists():
        raise ValueError(f"The model file '{path}' does not exist.")
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"The shard '{missing[0]}' is missing in '{folder}': download it.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"There is no .safetensors file in '{folder}'.")
    return files


@dataclass(frozen=True)
class LoadedFlux:
    """A FLUX in memory."""

    store: WeightStore
    config: FluxConfig
    identity: str
    path: str
    format: str


def load_flux(
    path: str | Path,
    *,
    format: str,
    device: torch.device | str = "cpu",
    quantize_on: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoadedFlux:
    """Read a FLUX file or diffusers folder into a store on `device`, its block matrices packed in
    `format` one after the other on `quantize_on`.

    Raises:
        ValueError: if a file is damaged, is not a FLUX.1, or lacks tensors.
    """
    if format not in FORMATS:
        raise ValueError(f"Unknown format '{format}'. Choose one of: {', '.join(FORMATS)}.")
    path = Path(path)
    files = TensorFiles(model_files(path))
    names = _OriginalNames(files) if "img_in.weight" in files else _DiffusersNames(files)
    config = FluxConfig.from_shapes(_checked_shapes(names, path))
    devices = (torch.device(quantize_on), torch.device(device))
    store = _pack_all(names, config, format, devices, on_progress)
    return LoadedFlux(store, config, files.identity(), str(path), format)


class _OriginalNames:
    """Tensors of a file in the original names."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.shapes = files.shapes

    def read(self, name: str, device: torch.device) -> Tensor:
        return self.files.read(name, device)


class _DiffusersNames:
    """Tensors of a diffusers file under the original names; q, k, v, mlp are fused on reading."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files
        self.parts = _diffusers_parts(files.shapes)
        self.shapes = {name: self._fused_shape(parts) for name, parts in self.parts.items()}

    def _fused_shape(self, parts: list[str]) -> tuple[int, ...]:
        rows = sum(self.files.shapes[part][0] for part in parts)
        return (rows, *self.files.shapes[parts[0]][1:])

    def read(self, name: str, device: torch.device) -> Tensor:
        parts = [self.files.read(part, device) for part in self.parts[name]]
        tensor = torch.cat(parts, dim=0) if len(parts) > 1 else parts[0]
        return swap_halves(tensor) if name.startswith(FINAL_MODULATION[1]) else tensor


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


def _checked_shapes(names: _OriginalNames | _DiffusersNames, path: Path):
    """The shapes under original names, after all that makes a FLUX.1 has been found."""
    shapes = names.shapes
    if "double_stream_modulation_img.lin.weight" in names.files:
        raise ValueError(f"'{path.name}' is a FLUX.2 model. This node loads FLUX.1 models.")
    essential = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight")
    absent = _first_missing(essential, shapes)
    if absent is not None:
        raise ValueError(
            f"'{path.name}' is not a FLUX.1 model: it has no '{absent}'. "
            "Choose a FLUX.1 file such as flux1-dev.safetensors."
        )
    config = FluxConfig.from_shapes(shapes)
    missing = _first_missing(_needed_names(config), shapes)
    if missing is not None:
        raise ValueError(f"'{path.name}' is an incomplete FLUX.1 model: '{missing}' is missing.")
    return shapes


def _first_missing(needed, shapes) -> str | None:
    return next((name for name in needed if name not in shapes), None)


def _needed_names(config: FluxConfig) -> list[str]:
    linears = original_linears(config)
    weights = [f"{name}.{end}" for name in linears for end in ("weight", "bias")]
    return weights + [f"{name}.scale" for name in norm_sources(config).values()]


def _pack_all(
    names: _OriginalNames | _DiffusersNames,
    config: FluxConfig,
    format: str,
    devices: tuple[torch.device, torch.device],
    on_progress: Callable[[int, int], None],
) -> WeightStore:
    quantize_on, device = devices
    packed: dict[str, PackedWeight] = {}
    plain: dict[str, Tensor] = {}
    needed = _needed_names(config)
    # Outside inference mode, in which the host runs its nodes: see store._PackedLinear.
    with torch.inference_mode(False), torch.no_grad():
        for done, name in enumerate(needed):
            tensor = names.read(name, quantize_on)
            if tensor.ndim == 2:
                in_block = name.startswith(("double_blocks.", "single_blocks."))
                packed[name] = PackedWeight.pack(tensor, format if in_block else "bf16")
                packed[name].to(device)
            else:
                plain[name] = tensor.to(device)
            on_progress(done + 1, len(needed))
    return WeightStore(packed, plain)
