"""Blocks compiled by torch.compile, around products with frozen matrices that it does not see into.

A compiler that saw the matrices would keep them, or what they unpack to, for the backward pass;
and it would compile every block anew, as each has others. So a product is one operation, which
finds its matrix by a number that is no constant: blocks of a kind share what is compiled, and any
format, place and move of the weights is as without it.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from .flux import LinearView

_VIEWS: weakref.WeakValueDictionary[int, LinearView] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def compile_blocks(transformer: Any, backend: str = "inductor") -> None:
    """Compile the blocks of the training face when they first run, for each kind and shape.

    Raises:
        ValueError: if this machine cannot compile.
    """
    _define_products()
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    for block in blocks:
        for module in block.modules():
            if isinstance(module, LinearView):
                number = next(_numbers)
                _VIEWS[number] = module
                with torch.inference_mode(False):
                    module.number = torch.tensor(number)
        block.compile(backend=backend)


def require_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile does not work, after compiling a sum for `device`."""
    try:
        with torch.inference_mode(False):
            torch.compile(_sum)(torch.ones(2, device=device))
    except Exception as error:  # what a compiler raises is not declared
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"torch.compile does not work here: {reason} It needs a C++ compiler on a CPU and "
            "Triton on a GPU. Install it, or turn compile of Speed Settings off."
        ) from error


def _sum(x: Tensor) -> Tensor:
    return (x + 1).sum()


@functools.cache
def _define_products() -> None:
    """torch.ops.atelier.frozen_product with the gradient of its input, and unpacked_product, which
    has none."""

    @torch.library.custom_op("atelier::frozen_product", mutates_args=())
    def product(x: Tensor, number: Tensor, width: int) -> Tensor:
        return _VIEWS[int(number)].seen_times(x)

    @torch.library.custom_op("atelier::frozen_product_gradient", mutates_args=())
    def gradient(grad_output: Tensor, number: Tensor, width: int) -> Tensor:
        return _VIEWS[int(number)].input_gradient(grad_output)

    @torch.library.custom_op("atelier::unpacked_product", mutates_args=())
    def unpacked(x: Tensor, number: Tensor, width: int) -> Tensor:
        return _VIEWS[int(number)].seen_times_unpacked(x)

    def shape(x: Tensor, number: Tensor, width: int) -> Tensor:
        return x.new_empty(*x.shape[:-1], width)

    def keep(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        x, ctx.number, _ = inputs
        ctx.width = x.shape[-1]

    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return gradient(grad_output, ctx.number, ctx.width), None, None

    product.register_fake(shape)
    gradient.register_fake(shape)
    unpacked.register_fake(shape)
    product.register_autograd(backward, setup_context=keep)
