"""One matrix in one format: unpacked, multiplied and differentiated through, row by row.

It is never held at full precision as a whole; what is packed is never written to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import require_format_on
from .formats import FORMATS, row_slices
from .offload import Streamed


class Matrix(ABC):
    """One frozen matrix [out, in] that a product is computed with."""

    shape: torch.Size

    @property
    @abstractmethod
    def format(self) -> str | None:
        """The format of `formats.FORMATS` that it is packed in, if it is one of them."""

    @abstractmethod
    def fetch(self) -> tuple[Tensor, Tensor | None]:
        """The bytes and scales of that format, on the device that computes; of a streamed block
        valid until another one is asked for."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Rows of the matrix [rows, in] in `dtype`, on the device that computes."""

    @abstractmethod
    def slices(self, dtype: torch.dtype, rows: slice = slice(None)) -> list[slice]:
        """`rows` in the parts that `linear` unpacks to `dtype` one after the other."""

    def linear(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """`x` [..., in] by the transposed rows, plus `bias` [rows]; differentiable in `x` only."""
        return _FrozenLinear.apply(x, self, bias, rows)

    def input_gradient(self, grad_output: Tensor, rows: slice = slice(None)) -> Tensor:
        """The gradient [..., in] of `x` in `linear`, for that of its result [..., rows]."""
        dtype = grad_output.dtype
        slices = self.slices(dtype, rows)
        if len(slices) == 1:
            return grad_output @ self.dequantize(dtype, rows)
        # Summed in float32: a half-precision sum would be rounded at every slice.
        grad = grad_output.new_zeros(*grad_output.shape[:-1], self.shape[1], dtype=torch.float32)
        for part in slices:
            outputs = slice(part.start - slices[0].start, part.stop - slices[0].start)
            grad += grad_output[..., outputs] @ self.dequantize(dtype, part)
        return grad.to(dtype)


class PackedWeight(Matrix):
    """One matrix [out, in] in packed form. Scales never cross rows, so any row range is exact.

    While its block is streamed, `data` and `scale` are what lies in RAM, and tensors of zeros
    without memory if that is on disk: only their names, types and shapes are of use then.
    """

    def __init__(self, format: str, data: Tensor, scale: Tensor | None, columns: int) -> None:
        self.streamed: Streamed | None = None
        self._format = format
        self.data = data
        self.scale = scale
        self.shape = torch.Size((data.shape[0], columns))

    @classmethod
    def pack(cls, matrix: Tensor, format: str) -> PackedWeight:
        """Quantize `matrix` [out, in] on the device where it lies.

        Raises:
            ValueError: if the format cannot hold a matrix of this width, or the device not the
                format.
        """
        require_format_on(format, matrix.device)
        columns, group = matrix.shape[1], FORMATS[format].group
        if columns % group:
            raise ValueError(
                f"A weight of {columns} columns cannot be stored in {format}, which needs a "
                f"multiple of {group}. Load this file as bf16."
            )
        data, scale = FORMATS[format].pack(matrix)
        return cls(format, data, scale, columns)

    @property
    def format(self) -> str:
        return self._format

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
        """Rows of the matrix [rows, in] in `dtype`; it may alias the store when nothing changes,
        and then lasts only until a weight of another block is asked for."""
        data, scale = self.fetch()
        if rows != slice(None):
            data, scale = data[rows], scale[rows] if scale is not None else None
        return FORMATS[self.format].unpack(data, scale, dtype)

    def fetch(self) -> tuple[Tensor, Tensor | None]:
        return self.streamed.fetch() if self.streamed else (self.data, self.scale)

    def slices(self, dtype: torch.dtype, rows: slice = slice(None)) -> list[slice]:
        start, stop, _ = rows.indices(self.shape[0])
        if self.data.dtype == dtype:  # nothing is unpacked
            return [slice(start, stop)]
        return row_slices(range(start, stop), self.shape[1], dtype)


class _FrozenLinear(torch.autograd.Function):
    """A product with a frozen matrix that autograd never sees.

    The host may move modules inside inference mode, after which their tensors cannot be saved for
    backward. So the weight travels as an attribute of `ctx` and is unpacked again in backward.
    A large matrix is unpacked and multiplied by row slices: no more than one exists at a time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Matrix, bias: Tensor | None, rows: slice) -> Tensor:
        ctx.weight, ctx.rows = weight, rows
        bias = bias.to(x.dtype) if bias is not None else None
        slices = weight.slices(x.dtype, rows)
        if len(slices) == 1:
            return F.linear(x, weight.dequantize(x.dtype, rows), bias)
        first = slices[0].start
        y = x.new_empty(*x.shape[:-1], slices[-1].stop - first)
        for part in slices:
            outputs = slice(part.start - first, part.stop - first)
            part_bias = bias[outputs] if bias is not None else None
            y[..., outputs] = F.linear(x, weight.dequantize(x.dtype, part), part_bias)
        return y

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return ctx.weight.input_gradient(grad_output, ctx.rows), None, None, None
