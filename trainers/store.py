"""The packed weights of one network: a single copy that every face of it computes with.

`PackedWeight` is one matrix in one format; `WeightStore` maps the names of the original FLUX file
to them. The store alone moves bytes between devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

NF4_BLOCK = 64
"""Weights per NF4 scale. FLUX's input widths are multiples of it, so a block never crosses rows."""


@dataclass(frozen=True)
class Format:
    """How a matrix [out, in] becomes bytes, and how rows of it come back.

    `pack` returns (data, scale); `unpack` takes those two, cut to some rows, and the dtype wanted.
    Both tensors have one entry of their first dimension per row of the matrix.
    """

    pack: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    unpack: Callable[[Tensor, Tensor | None, torch.dtype], Tensor]


def _pack_bf16(matrix: Tensor) -> tuple[Tensor, None]:
    return matrix.to(torch.bfloat16).contiguous(), None


def _unpack_bf16(data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return data.to(dtype)


def _pack_nf4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    functional = _bitsandbytes_functional()
    rows, columns = matrix.shape
    if columns % NF4_BLOCK:
        raise ValueError(
            f"A weight of {columns} columns cannot be stored in NF4, which needs a multiple of "
            f"{NF4_BLOCK}. Load this file as bf16."
        )
    data, state = functional.quantize_4bit(
        matrix.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
    )
    # Half the bytes of float32 scales; exact for weights that were read as bf16.
    scale = state.absmax.view(rows, columns // NF4_BLOCK).to(torch.bfloat16)
    return data.view(rows, columns // 2), scale


def _unpack_nf4(data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    functional = _bitsandbytes_functional()
    assert scale is not None
    rows, columns = data.shape[0], data.shape[1] * 2
    state = functional.QuantState(
        absmax=scale.flatten().float(),  # the kernels accept no other dtype
        shape=torch.Size((rows, columns)),
        dtype=dtype,
        blocksize=NF4_BLOCK,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(data.reshape(-1, 1), state)


FORMATS: dict[str, Format] = {
    "nf4": Format(_pack_nf4, _unpack_nf4),
    "bf16": Format(_pack_bf16, _unpack_bf16),
}


def _bitsandbytes_functional():
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ValueError(
            "NF4 weights need the package bitsandbytes: run `pip install bitsandbytes`, "
            "or load the model as bf16."
        ) from error
    return functional


class PackedWeight:
    """One matrix [out, in] in packed form. Scales never cross rows, so any row range is exact."""

    def __init__(self, format: str, data: Tensor, scale: Tensor | None, columns: int) -> None:
        self.format = format
        self.data = data
        self.scale = scale
        self.shape = torch.Size((data.shape[0], columns))

    @classmethod
    def pack(cls, matrix: Tensor, format: str) -> PackedWeight:
        """Quantize `matrix` [out, in] on the device where it lies.

        Raises:
            ValueError: if the format cannot hold a matrix of this width.
        """
        data, scale = FORMATS[format].pack(matrix)
        return cls(format, data, scale, matrix.shape[1])

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)

    def to(self, device: torch.device) -> None:
        """Move the bytes, in place of this object."""
        self.data = self.data.to(device)
        self.scale = self.scale.to(device) if self.scale is not None else None

    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of the matrix [rows, in] in `dtype`; it may alias the store when nothing changes."""
        scale = self.scale[rows] if self.scale is not None else None
        return FORMATS[self.format].unpack(self.data[rows], scale, dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """`x` [..., in] by the transposed rows, plus `bias` [rows]; differentiable in `x` only."""
        return _PackedLinear.apply(x, self, bias, rows)


class _PackedLinear(torch.autograd.Function):
    """A product with a frozen matrix that autograd never sees.

    The host may move modules inside inference mode, after which their tensors cannot be saved for
    backward. So the weight travels as an attribute of `ctx` and is unpacked again in backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedWeight, bias: Tensor | None, rows: slice) -> Tensor:
        ctx.weight, ctx.rows = weight, rows
        return F.linear(
            x, weight.dequantize(x.dtype, rows), bias.to(x.dtype) if bias is not None else None
        )

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output @ ctx.weight.dequantize(grad_output.dtype, ctx.rows), None, None, None


class WeightStore:
    """All tensors of one network by their original names: matrices packed, the rest plain.

    `packed` holds every `….weight` of a Linear (embedders as bf16), `plain` biases and norm scales.
    """

    def __init__(self, packed: dict[str, PackedWeight], plain: dict[str, Tensor]) -> None:
        self.packed = packed
        self.plain = plain
        self.device = next(iter(packed.values())).device
        self.bytes_moved = 0

    def place(self, device: torch.device | str) -> None:
        """Bring every byte to `device`; free when it already is there.

        When the device runs out of memory on the way, every byte goes back where it came from.
        """
        before, device = self.device, torch.device(device)
        if device == before:
            return
        try:
            self._move(device)
        except BaseException:
            self._move(before)
            raise
        self.device = device
        self.bytes_moved += self.num_bytes

    def _move(self, device: torch.device) -> None:
        for weight in self.packed.values():
            weight.to(device)
        self.plain = {name: tensor.to(device) for name, tensor in self.plain.items()}

    @property
    def num_bytes(self) -> int:
        packed = sum(weight.num_bytes for weight in self.packed.values())
        return packed + sum(tensor.nbytes for tensor in self.plain.values())

    def content_hash(self) -> str:
        """SHA-256 over the names and bytes of every tensor."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.packed):
            weight = self.packed[name]
            yield name, weight.data
            if weight.scale is not None:
                yield f"{name}.scale", weight.scale
        for name in sorted(self.plain):
            yield name, self.plain[name]
