"""TREAD: some image tokens go around some blocks (Krause et al. 2025, arXiv 2501.04765).

The tokens that stay are drawn for each sample of a batch; the others come back behind the last
block of the route as they were before the first. Text tokens always stay.

Shapes: B batch, S image tokens, K of them that stay, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import require
from .speed_settings import TreadRoute


@dataclass(frozen=True, kw_only=True)
class Route:
    """Blocks that tokens go around, by their numbers."""

    ratio: float
    """The share of the image tokens."""
    start: int
    """The first block."""
    stop: int
    """One behind the last."""

    def num_kept(self, num_tokens: int, num_forced: int = 0) -> int:
        """How many of the image tokens stay."""
        return max(num_tokens - round(num_tokens * self.ratio), num_forced, 1)


def routes_around(settings: Sequence[TreadRoute], num_blocks: int) -> tuple[Route, ...]:
    """The routes in a network of `num_blocks` blocks.

    Raises:
        ValueError: a block is not there, or a route begins before the one before it ends.
    """
    routes = [_route(one, num_blocks) for one in settings]
    for before, after in pairwise(routes):
        require(
            before.stop <= after.start,
            f"The TREAD routes around the blocks {_blocks(before)} and {_blocks(after)} overlap, "
            "or are not in the order of the blocks. Let each begin behind the one before it.",
        )
    return tuple(routes)


def _route(settings: TreadRoute, num_blocks: int) -> Route:
    first, last = settings.start_layer, settings.end_layer
    is_there = all(-num_blocks <= block < num_blocks for block in (first, last))
    route = Route(ratio=settings.selection_ratio, start=first % num_blocks, stop=last % num_blocks)
    require(
        is_there and route.start <= route.stop,
        f"There is no TREAD route from block {first} to {last} in this model: its blocks are 0 to "
        f"{num_blocks - 1}, and -1 is the last. Choose blocks of it, the first not behind the "
        "last.",
    )
    return Route(ratio=route.ratio, start=route.start, stop=route.stop + 1)


def _blocks(route: Route) -> str:
    return f"{route.start}-{route.stop - 1}"


@dataclass(frozen=True, eq=False)
class Kept:
    """The image tokens that stay, of each sample others, but as many."""

    ids: Tensor
    """[B, K], rising."""
    num_tokens: int
    """S"""

    @property
    def _flat(self) -> Tensor:
        """[B * K], places among the tokens of all samples."""
        samples = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        return (self.ids + samples * self.num_tokens).flatten()

    def take(self, tokens: Tensor) -> Tensor:
        """Of image tokens [B, S, D] those that stay, [B, K, D]."""
        # One index for each token: those of torch.gather would be as many as the numbers.
        taken = tokens.flatten(0, 1).index_select(0, self._flat)
        return taken.unflatten(0, self.ids.shape)

    def put_back(self, kept: Tensor, tokens: Tensor) -> Tensor:
        """`tokens` [B, S, D] with those that stay [B, K, D] in their places."""
        whole = tokens.flatten(0, 1).index_copy(0, self._flat, kept.flatten(0, 1))
        return whole.view_as(tokens)

    def positions(self, tables: tuple[Tensor, Tensor]) -> tuple[SampleRows, SampleRows]:
        """Of cos and sin [T + S, D] the rows of the text and of the tokens that stay."""
        cos, sin = tables
        num_text = len(cos) - self.num_tokens
        text = torch.arange(num_text, device=cos.device).expand(len(self.ids), num_text)
        rows = torch.cat([text, self.ids + num_text], dim=1)
        return SampleRows(cos[rows]), SampleRows(sin[rows])


class SampleRows:
    """cos or sin [B, T + K, D], of each sample others, where diffusers' attention knows only rows
    [T + K, D] for all of a batch: it asks for them as [1, T + K, 1, D]."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def __getitem__(self, _: object) -> Tensor:
        """[B, T + K, 1, D]"""
        return self._rows[:, :, None]


def draw_kept(
    route: Route,
    batch_size: int,
    num_tokens: int,
    generator: torch.Generator,
    forced: Tensor | None = None,
) -> Kept:
    """Draw which image tokens stay, all alike likely, on the CPU.

    Args:
        forced: [B, up to S] on the CPU, where a token must stay: then as many do as the sample
            with most of them needs.
    """
    order = torch.rand(batch_size, num_tokens, generator=generator)
    num_forced = 0
    if forced is not None:
        order[:, : forced.shape[1]].masked_fill_(forced, -1.0)
        num_forced = int(forced.sum(1).max())
    kept = order.argsort(dim=1)[:, : route.num_kept(num_tokens, num_forced)]
    return Kept(kept.sort(dim=1).values, num_tokens)


def forced_tokens(weights: Tensor | None) -> Tensor | None:
    """Of weights [B, 1, H, W] of latents the image tokens [B, H/2 * W/2] that must stay: those
    under more than half. Where all of a picture counts, none must."""
    if weights is None:
        return None
    forced = F.avg_pool2d(weights.float().cpu(), 2).flatten(1) > 0.5
    return forced & ~forced.all(dim=1, keepdim=True)
