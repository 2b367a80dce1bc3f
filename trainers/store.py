"""The packed weights of one network: a single copy that every face of it computes with.

`PackedWeight` is one matrix in one format; `WeightStore` maps the names of the original FLUX file
to them. The store alone moves bytes between devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .formats import FORMATS, row_slices


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
        columns, group = matrix.shape[1], FORMATS[format].group
        if columns % group:
            raise ValueError(
                f"A weight of {columns} columns cannot be stored in {format}, which needs a "
                f"multiple of {group}. Load this file as bf16."
            )
        data, scale = FORMATS[format].pack(matrix)
        return cls(format, data, scale, columns)

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

    def slices(self, dtype: torch.dtype, rows: slice = slice(None)) -> list[slice]:
        """`rows` in the parts that `linear` unpacks to `dtype` one after the other."""
        start, stop, _ = rows.indices(self.shape[0])
        if self.data.dtype == dtype:  # nothing is unpacked
            return [slice(start, stop)]
        return row_slices(range(start, stop), self.shape[1], dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)) -> Tensor:
        """`x` [..., in] by the transposed rows, plus `bias` [rows]; differentiable in `x` only."""
        return _PackedLinear.apply(x, self, bias, rows)


class _PackedLinear(torch.autograd.Function):
    """A product with a frozen matrix that autograd never sees.

    The host may move modules inside inference mode, after which their tensors cannot be saved for
    backward. So the weight travels as an attribute of `ctx` and is unpacked again in backward.
    A large matrix is unpacked and multiplied by row slices: no more than one exists at a time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: PackedWeight, bias: Tensor | None, rows: slice) -> Tensor:
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
        weight, dtype = ctx.weight, grad_output.dtype
        slices = weight.slices(dtype, ctx.rows)
        if len(slices) == 1:
            return grad_output @ weight.dequantize(dtype, ctx.rows), None, None, None
        # Summed in float32: a half-precision sum would be rounded at every slice.
        grad = grad_output.new_zeros(*grad_output.shape[:-1], weight.shape[1], dtype=torch.float32)
        for part in slices:
            outputs = slice(part.start - slices[0].start, part.stop - slices[0].start)
            grad += grad_output[..., outputs] @ weight.dequantize(dtype, part)
        return grad.to(dtype), None, None, None


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

    def tensors(self) -> list[Tensor]:
        """All that the store holds."""
        return [tensor for _, tensor in self._tensors()]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.packed):
            weight = self.packed[name]
            yield name, weight.data
            if weight.scale is not None:
                yield f"{name}.scale", weight.scale
        for name in sorted(self.plain):
            yield name, self.plain[name]
