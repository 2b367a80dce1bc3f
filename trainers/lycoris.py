"""LoKr and LoHa (Yeh et al. 2023, LyCORIS) beside a frozen Linear, without their dense matrices.

Shapes: in and out features of the Linear, r the rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .flux import LinearView
from .lora_layers import Adapted, Dropout, uniform
from .lora_settings import LoraSettings


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two factors of `size`, the smaller one first: `factor` where it divides it, else the largest
    divisor up to it and up to the root; -1 for no limit."""
    if factor > 0 and size % factor == 0:
        first, second = sorted((factor, size // factor))
        return first, second
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(number for number in range(limit, 0, -1) if size % number == 0)
    return first, size // first


def lokr_shapes(
    rows: int, columns: int, rank: int, settings: LoraSettings
) -> dict[str, tuple[int, int]]:
    """The shapes of a LoKr's factors by their names in a file: the large one is whole where the
    rank is half of its longer side or more, or `full_matrix` is on."""
    small_rows, large_rows = factorization(rows, settings.lokr_factor)
    small_columns, large_columns = factorization(columns, settings.lokr_factor)
    shapes = {"lokr_w1": (small_rows, small_columns)}
    if settings.full_matrix or 2 * rank >= max(large_rows, large_columns):
        return {**shapes, "lokr_w2": (large_rows, large_columns)}
    return {**shapes, "lokr_w2_a": (large_rows, rank), "lokr_w2_b": (rank, large_columns)}


class LokrLinear(Adapted):
    """y = W x + scale * (w1 ⊗ w2) x, where w2 may be w2_a w2_b."""

    def __init__(
        self,
        base: LinearView,
        name: str,
        dropout: Dropout,
        shapes: dict[str, tuple[int, int]],
        scale: float,
    ) -> None:
        """`scale` is for a w2 of two factors; where w2 is whole, every reader takes 1."""
        super().__init__(base, name, dropout)
        self.scale = 1.0 if "lokr_w2" in shapes else scale
        self.factors = nn.ParameterDict({part: self._zeros(*shapes[part]) for part in shapes})

    def added(self, x: Tensor) -> Tensor:
        """(w1 ⊗ w2) x is w1 X w2^T for x as a matrix X [columns of w1, columns of w2]."""
        factors = {part: factor.float() for part, factor in self.factors.items()}
        inner = self.dropout(x, self.name).unflatten(-1, (factors["lokr_w1"].shape[1], -1))
        for part in ("lokr_w2", "lokr_w2_b", "lokr_w2_a"):
            inner = F.linear(inner, factors[part]) if part in factors else inner
        return self.scale * (factors["lokr_w1"] @ inner).flatten(-2)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.factors)

    def start(self, generator: torch.Generator, init: str) -> None:
        """LyCORIS's: w1 and w2_a uniform, w2 or w2_b zeros."""
        with torch.no_grad():
            for part in ("lokr_w1", "lokr_w2_a"):
                if part in self.factors:
                    factor = self.factors[part]
                    rows, columns = factor.shape
                    factor.copy_(uniform(rows, columns, generator))


class LohaLinear(Adapted):
    """y = W x + scale * ((w1_a w1_b) ∘ (w2_a w2_b)) x, as the LoRA of rank r² that it equals."""

    def __init__(
        self, base: LinearView, name: str, dropout: Dropout, rank: int, scale: float
    ) -> None:
        super().__init__(base, name, dropout)
        self.scale = scale
        rows, columns = base.out_features, base.in_features
        self.hada_w1_a, self.hada_w1_b = self._empty(rows, rank), self._empty(rank, columns)
        self.hada_w2_a, self.hada_w2_b = self._zeros(rows, rank), self._empty(rank, columns)

    def added(self, x: Tensor) -> Tensor:
        w1_a, w1_b = self.hada_w1_a.float(), self.hada_w1_b.float()
        w2_a, w2_b = self.hada_w2_a.float(), self.hada_w2_b.float()
        down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
        up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        return F.linear(F.linear(self.dropout(x, self.name), down), up) * self.scale

    def trained(self) -> dict[str, nn.Parameter]:
        return {
            "hada_w1_a": self.hada_w1_a,
            "hada_w1_b": self.hada_w1_b,
            "hada_w2_a": self.hada_w2_a,
            "hada_w2_b": self.hada_w2_b,
        }

    def start(self, generator: torch.Generator, init: str) -> None:
        """LyCORIS's: w1_a ~ N(0, 0.1), both b ~ N(0, 1), w2_a zeros."""
        with torch.no_grad():
            for part in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_b):
                part.copy_(torch.randn(part.shape, generator=generator))
            self.hada_w1_a.mul_(0.1)
