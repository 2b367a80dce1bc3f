"""Products with frozen matrices in 8 bits, forward and for the gradient of their input.

Matrices in fp8 and int8 are multiplied as they are stored, with one scale for each token beside
them. Those in bf16 are rounded to fp8 in every product, as torchao's float8 training does it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formats import row_slices
from .packed_weight import Matrix

_STORED = ("fp8", "int8")
_CAPABILITIES = {"bf16": (8, 9), "fp8": (8, 9), "int8": (8, 0)}
"""By format, the compute capability from which on NVIDIA's cards multiply so."""
_FEW_TOKENS = 16
"""As many are no case for 8 bits: a modulation has one of each picture, on which all others depend.
torch._int_mm refuses them too."""
_ALIGNED = 16
"""Both kernels want the sides of a matrix in multiples of it; those of FLUX are ones of 128."""


class _Codes(NamedTuple):
    """A matrix in 8 bits: `data` [rows, columns] times `scale`, [rows, 1] or [1, 1]."""

    data: Tensor
    scale: Tensor


def require_products(products: str, device: torch.device, format: str) -> None:
    """Raises ValueError where matrices in a format cannot be multiplied as a setting wants it."""
    if products == "8bit" and (reason := _why_not(_capability(device), format)):
        raise ValueError(reason)


def has_products(products: str, device: torch.device, format: str) -> bool:
    """Whether matrices in a format can be multiplied as a setting wants it."""
    return products != "8bit" or _why_not(_capability(device), format) is None


def _capability(device: torch.device) -> tuple[int, int] | None:
    """That of an NVIDIA card, None of all else."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else None


def _why_not(capability: tuple[int, int] | None, format: str) -> str | None:
    if format not in _CAPABILITIES:
        return (
            f"A model in {format} cannot be multiplied in 8 bits: its weights have fewer. Load it "
            "as fp8, int8 or bf16, or set products of Speed Settings to dequantized."
        )
    if capability is None:
        return (
            "Products in 8 bits need an NVIDIA card: of compute capability 8.0 (RTX 30) or more "
            "for a model in int8, 8.9 (RTX 40) or more for fp8 and bf16. Set products of Speed "
            "Settings to dequantized."
        )
    needed = _CAPABILITIES[format]
    if capability >= needed:
        return None
    return (
        f"Products in 8 bits of a model in {format} need a card of compute capability {needed[0]}."
        f"{needed[1]} or more, and this one has {capability[0]}.{capability[1]}; for int8 8.0 is "
        "enough. Set products of Speed Settings to dequantized."
    )


def eight_bit_linear(
    weight: Matrix, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)
) -> Tensor:
    """As `weight.linear`, with `x`, the matrix and the gradient rounded to 8 bits.

    A matrix in another format than bf16, fp8 and int8 is rounded too, so `require_products`.
    """
    if x.numel() <= _FEW_TOKENS * x.shape[-1]:
        return weight.linear(x, bias, rows)
    return _EightBitLinear.apply(x, weight, bias, rows)


def eight_bit_input_gradient(
    weight: Matrix, grad_output: Tensor, rows: slice = slice(None)
) -> Tensor:
    """The gradient [..., in] of `x` in `eight_bit_linear`, for that [..., out] of its result."""
    if grad_output.numel() <= _FEW_TOKENS * grad_output.shape[-1]:
        return weight.input_gradient(grad_output, rows)
    dtype, grads = grad_output.dtype, grad_output.reshape(-1, grad_output.shape[-1])
    if weight.format in _STORED:
        codes = _stored(weight, rows)
        # The scales of the matrix lie along the sum here, so they go into the other factor.
        left = _by_rows(grads, weight.format, codes.scale.T)
        right = _Codes(codes.data.T, left.scale.new_ones(1, 1))
    else:
        codes = _by_tensor(weight.dequantize(dtype, rows), torch.float8_e4m3fn)
        left, right = _by_tensor(grads, torch.float8_e5m2), _Codes(codes.data.T, codes.scale)
    grad = _product(left, right, None, dtype, is_fast=False)
    return grad.view(*grad_output.shape[:-1], -1)


class _EightBitLinear(torch.autograd.Function):
    """The weight is an attribute of `ctx` alone: see `packed_weight`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Matrix, bias: Tensor | None, rows: slice) -> Tensor:
        ctx.weight, ctx.rows = weight, rows
        tokens = x.reshape(-1, x.shape[-1])
        if weight.format in _STORED:
            left, right = _by_rows(tokens, weight.format), _stored(weight, rows)
        else:
            left = _by_tensor(tokens, torch.float8_e4m3fn)
            right = _by_tensor(weight.dequantize(x.dtype, rows), torch.float8_e4m3fn)
        # torchao sums so too: less exactly forward, where that is faster, than for gradients.
        y = _product(left, right, bias, x.dtype, is_fast=True)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return eight_bit_input_gradient(ctx.weight, grad_output, ctx.rows), None, None, None


def _stored(weight: Matrix, rows: slice) -> _Codes:
    data, scale = weight.fetch()
    assert scale is not None
    return _Codes(data[rows], scale[rows])


def _by_rows(matrix: Tensor, format: str, factors: Tensor | None = None) -> _Codes:
    """`matrix`, its columns times `factors` [1, columns], with a scale for each row."""
    dtype = torch.int8 if format == "int8" else torch.float8_e4m3fn
    parts = []
    for rows in row_slices(range(len(matrix)), matrix.shape[1], torch.float32):
        numbers = matrix[rows].float() if factors is None else matrix[rows].float() * factors
        parts.append(_rounded(numbers, *numbers.aminmax(dim=1, keepdim=True), dtype))
    return _Codes(*map(torch.cat, zip(*parts, strict=True)))


def _by_tensor(matrix: Tensor, dtype: torch.dtype) -> _Codes:
    """With one scale for all of it."""
    low, high = (number.view(1, 1) for number in matrix.aminmax())
    slices = row_slices(range(len(matrix)), matrix.shape[1], torch.float32)
    parts = [_rounded(matrix[rows].float(), low, high, dtype) for rows in slices]
    return _Codes(torch.cat([part.data for part in parts]), parts[0].scale)


def _rounded(numbers: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> _Codes:
    """By scales with which the largest number between `low` and `high` becomes that of `dtype`."""
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    # In float64 and never infinite, as in torchao, whose least number gradients can be below.
    factor = (largest / torch.maximum(-low, high).double().clamp_min(1e-30)).float()
    codes = (numbers * factor).clamp_(-largest, largest)
    data = (codes.round_() if dtype == torch.int8 else codes).to(dtype)
    return _Codes(data, factor.reciprocal())


def _product(
    left: _Codes, right: _Codes, bias: Tensor | None, dtype: torch.dtype, *, is_fast: bool
) -> Tensor:
    """`left` [M, K] by the transposed `right` [N, K], plus `bias` [N], rounded once to `dtype`.

    The sums take four bytes each, so there are some columns of them at a time.
    """
    num_tokens, num_outputs = len(left.data), len(right.data)
    y = torch.empty(num_tokens, num_outputs, dtype=dtype, device=left.data.device)
    of_outputs = right.scale.float().T.expand(1, num_outputs)
    for part in row_slices(range(num_outputs), num_tokens, torch.float32, multiple=_ALIGNED):
        # The kernels read both factors along the sum: of a transposed one, a copy of some rows.
        sums = _sums(left.data, right.data[part].contiguous(), is_fast=is_fast)
        scaled = (sums * left.scale).mul_(of_outputs[:, part])
        y[:, part] = scaled.add_(bias[part]) if bias is not None else scaled
    return y


def _sums(left: Tensor, right: Tensor, *, is_fast: bool) -> Tensor:
    """`left` [M, K] by the transposed `right` [N, K]: int32 of integers, else float32."""
    if left.dtype == torch.int8:
        return torch._int_mm(left, right.T)
    # Scales by rows are refused on Windows and on the newest cards (PyTorch's pull request 194606
    # and issue 192707), so they are applied to the sums.
    one = torch.ones((), device=left.device)
    return torch._scaled_mm(
        left, right.T, one, one, out_dtype=torch.float32, use_fast_accum=is_fast
    )
