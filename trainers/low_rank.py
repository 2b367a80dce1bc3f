"""Products of two thin matrices: cut, stacked, truncated, and found in a difference.

No dense product is made but where one is given.

Shapes: out rows and in columns of the matrix that is changed, r the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_OVERSAMPLING = 16
_POWER_STEPS = 6
"""How much wider the subspace is than what is asked for, and how often the matrix is applied to it:
see `truncated_svd`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """scale * up @ down, in float32."""

    down: Tensor
    """[r, in]"""
    up: Tensor
    """[out, r]"""
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> Tensor:
        """[out, in]"""
        return self.scale * (self.up @ self.down)

    def squared_norm(self) -> float:
        """The sum of the squares of all numbers of the dense product."""
        up, down = self.up.double(), self.down.double()
        return self.scale**2 * float(((up.T @ up) * (down @ down.T)).sum())

    def times(self, weight: float) -> LowRank:
        return LowRank(down=self.down, up=self.up, scale=self.scale * weight)

    def folded(self) -> LowRank:
        """The same with a scale of 1."""
        return LowRank(down=self.down, up=self.up * self.scale)

    def on_rows(self, rows: slice) -> LowRank | None:
        """These rows, without the columns that are 0 there; None if the others alone are not 0."""
        up = self.up[rows]
        used = up.any(dim=0)
        if used.all() or not self.up.any():
            return LowRank(down=self.down, up=up, scale=self.scale)
        if not used.any():
            return None
        return LowRank(down=self.down[used], up=up[:, used], scale=self.scale)

    def truncated(self, rank: int) -> LowRank:
        """The nearest one of at most this rank (Eckart-Young), from the factors: two thin QRs, and
        the SVD of an [r, r] matrix."""
        if self.rank <= rank:
            return self
        return self._nearest(rank, self.scale)

    @property
    def cancels(self) -> bool:
        """Whether its columns take each other away until an eighth is left, so that rounding the
        factors rounds what is left at least eight times as much."""
        norms = self.up.double().square().sum(0) * self.down.double().square().sum(1)
        return self.squared_norm() < self.scale**2 * float(norms.sum()) / 64

    def balanced(self) -> LowRank:
        """The same product and scale with factors whose columns are orthogonal: none cancel."""
        nearest = self._nearest(self.rank, 1.0)
        return LowRank(down=nearest.down, up=nearest.up, scale=self.scale)

    def _nearest(self, rank: int, scale: float) -> LowRank:
        """That of scale * up @ down."""
        q_up, r_up = torch.linalg.qr(self.up.double() * scale)
        q_down, r_down = torch.linalg.qr(self.down.double().T)
        u, s, v = torch.linalg.svd(r_up @ r_down.T)
        return _from_svd(q_up @ u[:, :rank], s[:rank], v[:rank] @ q_down.T)


def stacked(pieces: Sequence[tuple[int, LowRank]], num_rows: int) -> LowRank:
    """The sum of products that begin at a row each: `down` stacked, `up` side by side, 0 elsewhere.

    Factors stay bit for bit what they were where all scales are equal.
    """
    scale = pieces[0][1].scale
    if any(piece.scale != scale for _, piece in pieces):
        scale, pieces = 1.0, [(start, piece.folded()) for start, piece in pieces]
    up = torch.zeros(num_rows, sum(piece.rank for _, piece in pieces))
    column = 0
    for start, piece in pieces:
        up[start : start + len(piece.up), column : column + piece.rank] = piece.up
        column += piece.rank
    return LowRank(down=torch.cat([piece.down for _, piece in pieces]), up=up, scale=scale)


def low_rank_of(matrix: Tensor, rank: int, energy: float = 1.0) -> LowRank:
    """The nearest product of a dense matrix [out, in], of at most `rank`, and of the smallest rank
    that keeps this share of its squared norm if one does. On the CPU."""
    u, s, v = truncated_svd(matrix, rank)
    needed = energy * squared_norm(matrix)
    kept = torch.cumsum(s.cpu().double() ** 2, 0)
    size = min(int((kept < needed).sum()) + 1, len(s)) if energy < 1.0 else len(s)
    return _from_svd(u[:, :size], s[:size], v[:size])


def squared_norm(matrix: Tensor) -> float:
    """The sum of the squares of its numbers; Apple's GPUs have no float64."""
    return float(torch.linalg.vector_norm(matrix)) ** 2


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """u [out, k], s [k] and v [k, in] of the k <= rank largest singular values.

    Large matrices by subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4), which is
    exact where the rank is no higher than asked for; the same numbers each time.
    """
    width = rank + _OVERSAMPLING
    if 2 * width >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
        basis = torch.linalg.qr(matrix @ start)[0]
        for _ in range(_POWER_STEPS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
        small, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ small
    return u[:, :rank], s[:rank], v[:rank]


def kron_low_rank(first: Tensor, second: Tensor, rank: int, scale: float) -> LowRank:
    """The nearest product of at most this rank of scale * (first ⊗ second): the singular values of
    a Kronecker product are the products of those of its factors."""
    u1, s1, v1 = torch.linalg.svd(first.double(), full_matrices=False)
    u2, s2, v2 = torch.linalg.svd(second.double(), full_matrices=False)
    values = torch.outer(s1, s2).flatten()
    best = values.topk(min(rank, len(values))).indices
    i, j = best // len(s2), best % len(s2)
    up = (u1[:, None, i] * u2[None, :, j]).flatten(0, 1)
    down = (v1[i][:, :, None] * v2[j][:, None, :]).flatten(1)
    return _from_svd(up, values[best], down).times(scale)


def hadamard_low_rank(first: LowRank, second: LowRank, scale: float) -> LowRank:
    """scale * (first ∘ second), exactly: its rank is the product of theirs."""
    up = (first.up[:, :, None] * second.up[:, None, :]).flatten(1)
    down = (first.down[:, None, :] * second.down[None, :, :]).flatten(0, 1)
    return LowRank(down=down, up=up, scale=scale * first.scale * second.scale)


def _from_svd(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    root = s.sqrt()
    down, up = root[:, None] * v, u * root
    return LowRank(down=down.float().cpu().contiguous(), up=up.float().cpu().contiguous())
