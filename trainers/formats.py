"""Weight formats: how a matrix becomes few bytes, and how rows of it come back.

Everything is plain torch but nf4 and fp4, which are bitsandbytes' kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .packages import importing, install_command

SLICE_BYTES = 32 << 20
"""A matrix that is larger than this when unpacked is packed and computed by row slices."""

_FITS = 4
"""Refits of a group's scale and minimum; four more would win half a percent of the error."""


@dataclass(frozen=True)
class Format:
    """One way to keep a matrix [out, in].

    `pack` returns (data, scale); `unpack` takes those two, cut to some rows, and the dtype wanted.
    Both tensors have one entry of their first dimension per row of the matrix. The width of the
    matrix must be a multiple of `group`, the number of neighbours in a row that share a scale.
    """

    pack: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    unpack: Callable[[Tensor, Tensor | None, torch.dtype], Tensor]
    group: int = 1


def row_slices(rows: range, columns: int, dtype: torch.dtype, *, multiple: int = 1) -> list[slice]:
    """`rows` in consecutive slices of at most SLICE_BYTES each in `dtype`, or of `multiple` rows if
    those take more; all but the last have a multiple of so many rows."""
    step = max(1, SLICE_BYTES // (columns * dtype.itemsize * multiple)) * multiple
    return [slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)]


def _slice_by_slice(pack: Callable[..., tuple[Tensor, Tensor]]) -> Callable:
    """Pack row slices one after the other, so that only their float32 copies exist at once."""

    @functools.wraps(pack)
    def packed(matrix: Tensor, **settings) -> tuple[Tensor, Tensor]:
        slices = row_slices(range(matrix.shape[0]), matrix.shape[1], torch.float32)
        data, scale = zip(*(pack(matrix[rows], **settings) for rows in slices), strict=True)
        return torch.cat(data), torch.cat(scale)

    return packed


def _pack_bf16(matrix: Tensor) -> tuple[Tensor, None]:
    return matrix.to(torch.bfloat16).contiguous(), None


def _unpack_bf16(data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return data.to(dtype)


@_slice_by_slice
def _pack_rows(matrix: Tensor, *, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row over its own scale, so that its largest weight becomes `largest`."""
    weights = matrix.float()
    scale = _storable(weights.abs().amax(1, keepdim=True) / largest)
    codes = (weights / scale.float()).clamp_(-largest, largest)
    return (codes if dtype.is_floating_point else codes.round_()).to(dtype), scale


def _unpack_rows(data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert scale is not None
    wide = _wide(dtype)
    return data.to(wide).mul_(scale.to(wide)).to(dtype)


@_slice_by_slice
def _pack_bnb(matrix: Tensor, *, kind: str, group: int) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    data, state = bitsandbytes_functional().quantize_4bit(
        matrix.contiguous(), blocksize=group, quant_type=kind, compress_statistics=False
    )
    # Half the bytes of float32 scales; exact for weights that were read as bf16.
    scale = state.absmax.view(rows, columns // group).to(torch.bfloat16)
    return data.view(rows, columns // 2), scale


def _unpack_bnb(
    data: Tensor, scale: Tensor | None, dtype: torch.dtype, *, kind: str, group: int
) -> Tensor:
    bitsandbytes_functional()  # registers the kernel
    assert scale is not None
    absmax = scale.flatten().float()  # the kernels accept no other dtype
    shape = (data.shape[0], data.shape[1] * 2)
    return torch.ops.bitsandbytes.dequantize_4bit(data, absmax, group, kind, shape, dtype)


@_slice_by_slice
def _pack_groups(matrix: Tensor, *, bits: int, group: int, start: float) -> tuple[Tensor, Tensor]:
    """Codes 0 … 2^bits - 1 of each group, weight = code * scale + minimum, by least squares.

    Codes and the line through them are fitted in turn (Lloyd's iteration with evenly spaced
    levels), from levels that span the part `start` of the group's range. Byte k of a group holds
    the codes of its weights k, k + n, k + 2n, …, lowest bits first, where n is its bytes.
    """
    rows, columns = matrix.shape
    weights = matrix.float().view(rows, columns // group, group)
    low, high = weights.amin(-1, keepdim=True), weights.amax(-1, keepdim=True)
    top = 2**bits - 1
    margin = (high - low) * ((1 - start) / 2)
    line = _line((high - low) * (start / top), low + margin)
    codes = _codes(weights, line, top)
    mean = weights.mean(-1, keepdim=True)
    for _ in range(_FITS):
        middle = codes.mean(-1, keepdim=True)
        codes -= middle
        spread = codes.square().sum(-1, keepdim=True)
        # Codes that are all the same tell no slope: the group keeps the scale that it has.
        slope = codes.mul_(weights).sum(-1, keepdim=True) / spread
        slope = torch.where(spread > 0, slope, line[..., :1].float())
        line = _line(slope, mean - slope * middle)
        codes = _codes(weights, line, top)
    parts = codes.to(torch.uint8).view(rows, columns // group, 8 // bits, -1)
    data = (parts << _shifts(bits, parts.device)).sum(2, dtype=torch.uint8)
    return data.view(rows, -1), line


def _line(scale: Tensor, minimum: Tensor) -> Tensor:
    """Both in one tensor [rows, groups, 2], rounded as they are stored."""
    return torch.cat([_storable(scale), minimum.to(torch.bfloat16)], dim=-1)


def _codes(weights: Tensor, line: Tensor, top: int) -> Tensor:
    scale, minimum = line.float().split(1, dim=-1)
    return (weights - minimum).div_(scale).round_().clamp_(0, top)


def _unpack_groups(data: Tensor, scale: Tensor | None, dtype: torch.dtype, *, bits: int) -> Tensor:
    assert scale is not None
    rows, groups, _ = scale.shape
    parts = data.view(rows, groups, 1, -1) >> _shifts(bits, data.device)
    codes = parts.bitwise_and_(2**bits - 1).view(rows, groups, -1)
    factor, minimum = scale.to(dtype).split(1, dim=-1)
    # Two steps, each rounded: fused, the same weight could differ with its place in a slice.
    return codes.to(dtype).mul_(factor).add_(minimum).view(rows, -1)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).view(-1, 1)


def _storable(scale: Tensor) -> Tensor:
    """A scale as it is kept, which is never zero: weights are divided by it."""
    return scale.clamp_min(1e-30).to(torch.bfloat16)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What to scale in: the scale of a row may lie below fp16's range."""
    return torch.float32 if dtype == torch.float16 else dtype


@functools.cache  # asked for at every product
def bitsandbytes_functional():
    """The module, or ValueError where it cannot be imported."""
    try:
        with importing("bitsandbytes"):
            import bitsandbytes.functional as functional
    except ValueError as error:
        raise ValueError(
            "The package bitsandbytes is missing, or does not fit the others here. For pictures, "
            "choose the format int4, which does without it; or run this with the Python of "
            f"ComfyUI, then start ComfyUI again: {install_command('bitsandbytes')}"
        ) from error
    return functional


def _scaled_rows(largest: float, dtype: torch.dtype) -> Format:
    return Format(partial(_pack_rows, largest=largest, dtype=dtype), _unpack_rows)


def _bitsandbytes(kind: str, group: int) -> Format:
    settings = {"kind": kind, "group": group}
    return Format(partial(_pack_bnb, **settings), partial(_unpack_bnb, **settings), group)


def _grouped(bits: int, group: int, start: float) -> Format:
    pack = partial(_pack_groups, bits=bits, group=group, start=start)
    return Format(pack, partial(_unpack_groups, bits=bits), group)


FORMATS: dict[str, Format] = {
    "bf16": Format(_pack_bf16, _unpack_bf16),
    "fp8": _scaled_rows(largest=448, dtype=torch.float8_e4m3fn),
    "int8": _scaled_rows(largest=127, dtype=torch.int8),
    "nf4": _bitsandbytes("nf4", group=64),
    "fp4": _bitsandbytes("fp4", group=64),
    "int4": _grouped(bits=4, group=64, start=1.0),
    "int2": _grouped(bits=2, group=32, start=0.7),
}
"""By name, from most to fewest bytes; docs/formats.md has the errors. `start` gave the smallest
error on Gaussian, heavy-tailed and the nano model's weights."""
