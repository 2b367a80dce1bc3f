"""Safetensors files read tensor by tensor, at header offsets: a mapped file would stay resident."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from .four_bit import AUXILIARIES, FourBit, dequantize, state_names

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""What safetensors calls the types."""
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_RENAMED_NORMS = (".norm.query_norm.weight", ".norm.key_norm.weight")
"""How newer versions of ComfyUI (0.33 is one) call the QK-norms' `scale`, also in saved files."""
_CLIP_PARTS = ("embeddings.", "encoder.layers.", "final_layer_norm.")
"""How the names of a CLIP begin that transformers 5 saved; all others begin with `text_model.`."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_SAMPLE_BYTES = 4096
_SAMPLED_TENSOR_BYTES = 4 * _SAMPLE_BYTES
"""Tensors from this size on tell one model from another: every matrix, also of a small model."""
_SCALE_NAMES = ("scale_weight", "weight_scale")
"""How ComfyUI's fp8 files call the factor of a `weight`, in older and newer ones."""
_FP8 = ("F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file: where its bytes lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFiles:
    """The tensors of one or several safetensors files by name, read on demand.

    Bytes are read into one reused buffer. What other files change in the network's names is taken
    back: ComfyUI's prefix and names of norms, and the prefix that transformers 5 leaves out. A
    matrix that bitsandbytes packed counts as one tensor of its shape.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._entries: dict[str, Entry] = {}
        self._buffer = bytearray()
        digest = hashlib.sha256()
        for path in paths:
            entries, header = read_header(path)
            digest.update(json.dumps(header, sort_keys=True).encode())
            self._entries |= {original_name(name): entry for name, entry in entries.items()}
        self._header_digest = digest
        self.num_bytes = sum(entry.num_bytes for entry in self._entries.values())
        self._four_bit = self._find_four_bit()
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.shapes |= {name: state.shape for name, state in self._four_bit.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str, device: torch.device) -> Tensor:
        """A fresh bf16 tensor on `device`: fp8 multiplied by its scale, 4 bits dequantized.

        Raises:
            ValueError: if it is of another type, or has a scale of another shape.
        """
        if name in self._four_bit:
            data, state = self._read_four_bit(name, device)
            return dequantize(data, state).to(torch.bfloat16)
        raw = self._view(name)
        if not raw.dtype.is_floating_point:
            raise self._wrong_type(name)
        scale_name = self._scale_name(name)
        if scale_name is not None:
            raw = raw.to(torch.float32, copy=True)  # the buffer is used again
            raw *= self._scale(scale_name, raw.shape)
        return raw.to(device=device, dtype=torch.bfloat16, copy=True)

    def _scale_name(self, name: str) -> str | None:
        names = (name.removesuffix("weight") + end for end in _SCALE_NAMES)
        return next((name for name in names if name in self._entries), None)

    def _scale(self, name: str, shape: torch.Size) -> Tensor:
        """The factor of a `weight` of this shape, or one for each of its rows."""
        scale = self._view(name).float()
        rows = (shape[0],)
        if scale.numel() != 1 and scale.shape not in (rows, (*rows, 1)):
            raise ValueError(
                f"The scale '{name}' in '{self._entries[name].path.name}' has the shape "
                f"{list(scale.shape)}, and its weight {list(shape)}. Use a file whose scales are "
                "one number for each weight, or one for each of its rows."
            )
        return scale.view(-1, *[1] * (len(shape) - 1))

    def packed_format(self, name: str) -> str | None:
        """The format of the store in which the file already holds a matrix, if it does."""
        if name in self._four_bit:
            return self._four_bit[name].store_format
        return "fp8" if self._entries[name].dtype in _FP8 else None

    def read_packed(self, name: str) -> tuple[Tensor, Tensor]:
        """The packed bytes [rows, ...] and the scales [rows, ...] of a matrix as the store has
        them, on the CPU; only where `packed_format` names a format.

        Raises:
            ValueError: if it has a scale of another shape.
        """
        rows = self.shapes[name][0]
        if name not in self._four_bit:
            return self._read_fp8(name, rows)
        data, state = self._read_four_bit(name, torch.device("cpu"))
        return data.view(rows, -1), state.absmax.view(rows, -1)

    def _read_fp8(self, name: str, rows: int) -> tuple[Tensor, Tensor]:
        data, scale_name = self._view(name).clone(), self._scale_name(name)
        if scale_name is None:
            return data, torch.ones(rows, 1, dtype=torch.bfloat16)
        return data, self._scale(scale_name, data.shape).expand(rows, 1).clone()

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

    def _view(self, name: str) -> Tensor:
        """A tensor as it is in the file, until the next one is read."""
        entry = self._entries[name]
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise self._wrong_type(name)
        if len(self._buffer) < entry.num_bytes:
            self._buffer = bytearray(entry.num_bytes)
        view = memoryview(self._buffer)[: entry.num_bytes]
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(view) != entry.num_bytes:
                raise _cut_short(entry.path)
        return torch.frombuffer(view, dtype=dtype).view(entry.shape)

    def _wrong_type(self, name: str) -> ValueError:
        entry = self._entries[name]
        return ValueError(
            f"The tensor '{name}' in '{entry.path.name}' has the type {entry.dtype}. "
            "Use a file in bf16, fp16, fp32, fp8 or the 4 bits of bitsandbytes."
        )

    def _find_four_bit(self) -> dict[str, FourBit]:
        found = {}
        for name, state_name in state_names(self._entries):
            state = FourBit.from_bytes(bytes(self._view(state_name).tolist()), state_name)
            for part in (name, *(f"{name}.{end}" for end in AUXILIARIES[state.is_nested])):
                if part not in self._entries:
                    file = self._entries[state_name].path.name
                    raise ValueError(
                        f"'{file}' is an incomplete FLUX.1 model: '{part}' is missing. "
                        "Download it again, or choose another file."
                    )
            found[name] = state
        return found

    def _read_four_bit(self, name: str, device: torch.device):
        """Packed bytes and their state, an object of bitsandbytes."""
        state = self._four_bit[name]
        ends = [*AUXILIARIES[state.is_nested], state.suffix]
        tensors = {end: self._view(f"{name}.{end}").clone() for end in ends}
        data = self._view(name).to(device, copy=True)
        return data, state.load(tensors, device)


def original_name(name: str) -> str:
    """The name in black-forest-labs' file, or in OpenAI's of CLIP-L, of what others call `name`."""
    if name.startswith(_CLIP_PARTS):
        return f"text_model.{name}"
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    if name.endswith(_RENAMED_NORMS):
        return f"{name.removesuffix('weight')}scale"
    return name


def shapes_in_header(stored: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The shapes of `TensorFiles`, where only a header is at hand.

    A matrix of 4 bits lies there as bytes of two weights, and has the rows that its bias has
    numbers: what else tells its shape is in the file itself.
    """
    shapes = {original_name(name): tuple(shape) for name, shape in stored.items()}
    for name, _ in state_names(tuple(shapes)):
        bias = f"{name.removesuffix('weight')}bias"
        if name in shapes and bias in shapes:
            (rows,) = shapes[bias]
            shapes[name] = (rows, 2 * math.prod(shapes[name]) // rows)
    return shapes


def read_header(path: Path, *, whole: bool = True) -> tuple[dict[str, Entry], dict]:
    """The tensors of a safetensors file by name, and its whole JSON header.

    Raises:
        ValueError: if it is another kind of file or, where it must be `whole`, shorter than its
            header says.
    """
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
        entries = {
            name: _entry(path, info, data_start)
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, AttributeError, LookupError, TypeError):
        raise wrong from None
    ends = (entry.start + entry.num_bytes for entry in entries.values())
    if whole and size < max(ends, default=data_start):
        raise _cut_short(path)
    return entries, header


def read_bytes(file: BufferedReader, entry: Entry) -> Tensor:
    """The bytes of a tensor [num_bytes], read straight into the memory that stays: a mapped file
    would count beside it.

    Raises:
        ValueError: if the file ends before.
    """
    data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(data.numpy().data) != entry.num_bytes:
        raise _cut_short(entry.path)
    return data


def checksum(data: Tensor) -> bytes:
    """The sum of all 8-byte words of bytes [n], and the bytes after them: every byte counts, at the
    speed of memory. A cryptographic hash of a model would take longer than the disk."""
    size = data.numel() // 8 * 8
    words = int(data[:size].view(torch.int64).sum())
    return words.to_bytes(8, "little", signed=True) + bytes(data[size:].tolist())


def _entry(path: Path, info: dict, data_start: int) -> Entry:
    begin, end = info["data_offsets"]
    return Entry(path, info["dtype"], tuple(info["shape"]), data_start + begin, end - begin)


def _cut_short(path: Path) -> ValueError:
    return ValueError(f"The file '{path.name}' is cut short: download it again.")


def model_files(path: Path) -> list[Path]:
    """The safetensors files of a model: the file itself, or those of a diffusers folder.

    Raises:
        ValueError: if `path`, or a shard that its index names, is missing, there is no file, or it
            is a pickle.
    """
    if not path.exists():
        raise ValueError(
            f"The model file '{path}' does not exist. Put it there, or choose another."
        )
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"'{path.name}' is a pickle, a file that can run code when it is opened, and is not "
            "read. Choose the .safetensors file of this model."
        )
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        names = _index_files(indexes[0])
        files = [folder / name for name in sorted(set(names))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"The shard '{missing[0]}' is missing in '{folder}': download it.")
        return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"There is no .safetensors file in '{folder}'. Download the model into it, or choose "
            "another."
        )
    return files


def _index_files(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"The index '{index}' is damaged: download it again.") from None
