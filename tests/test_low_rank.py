"""Arithmetic of thin factors against dense matrices and numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from atelier.trainers.low_rank import LowRank, low_rank_of, stacked, truncated_svd
from torch import Tensor


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(out: int, columns: int, rank: int, scale: float = 1.0) -> LowRank:
    return LowRank(down=noise(rank, columns, seed=1), up=noise(out, rank, seed=2), scale=scale)


def nearest(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]).float()


def test_a_truncated_product_is_the_nearest_of_its_rank() -> None:
    whole = product(40, 30, 12, scale=0.3)
    found = whole.truncated(5)
    assert found.rank == 5
    torch.testing.assert_close(found.dense(), nearest(whole.dense(), 5), rtol=0, atol=1e-5)
    assert whole.truncated(12) is whole
    torch.testing.assert_close(whole.squared_norm(), float((whole.dense().double() ** 2).sum()))


def test_factors_that_are_stacked_and_cut_again_are_the_same_bits() -> None:
    parts = [product(10, 8, rank, scale=0.5) for rank in (2, 3, 4)]
    whole = stacked([(10 * n, part) for n, part in enumerate(parts)], 30)
    assert (whole.rank, whole.scale) == (9, 0.5)
    for number, part in enumerate(parts):
        found = whole.on_rows(slice(10 * number, 10 * number + 10))
        assert found is not None
        assert torch.equal(found.down, part.down)
        assert torch.equal(found.up, part.up)


def test_products_of_different_scales_are_added_exactly() -> None:
    first, second = product(10, 8, 2, scale=0.7), product(6, 8, 3, scale=-2.0)
    expected = first.dense()
    expected[4:] += second.dense()
    torch.testing.assert_close(stacked([(0, first), (4, second)], 10).dense(), expected)


@pytest.mark.parametrize("shape", [(300, 200), (200, 500)])
def test_a_large_matrix_of_low_rank_is_found_exactly(shape: tuple[int, int]) -> None:
    whole = product(*shape, rank=6).dense()
    found = low_rank_of(whole, 8)
    assert torch.max(torch.abs(found.dense() - whole)) <= 1e-4
    assert torch.equal(low_rank_of(whole, 8).up, found.up)


def test_the_largest_singular_values_of_a_full_matrix_are_numpys() -> None:
    matrix = noise(300, 200) * torch.linspace(1, 0.01, 200)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)[:10]
    assert np.abs(truncated_svd(matrix, 10)[1].numpy() / expected - 1).max() <= 5e-3


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.8, 2), (0.9, 3), (0.99, 4), (1.0, 4)])
def test_the_share_that_is_enough_chooses_the_rank(energy: float, rank: int) -> None:
    """The squares of 3, 2, 1.2, 0.5 are 9, 4, 1.44, 0.25 of 14.69: shares 0.61, 0.88, 0.98, 1."""
    u, v = torch.linalg.qr(noise(20, 4))[0], torch.linalg.qr(noise(30, 4))[0]
    matrix = u * torch.tensor([3.0, 2.0, 1.2, 0.5]) @ v.T
    assert low_rank_of(matrix, 4, energy).rank == rank
