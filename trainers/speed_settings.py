"""What makes a step cheaper, in time or in memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .checks import require

CHECKPOINTING = ("all", "interval", "selective")
PRODUCTS = ("dequantized", "8bit")
_ROUTE = re.compile(r"\s*(\d*\.?\d+)\s*:\s*(-?\d+)\s*to\s*(-?\d+)\s*")


@dataclass(frozen=True, kw_only=True)
class TreadRoute:
    """Blocks that some of the image tokens go around. Blocks count through both kinds, the double
    ones first; negative numbers count from the end, -1 being the last."""

    selection_ratio: float
    """The share of the image tokens that goes around, above 0 and below 1."""
    start_layer: int
    """The first block that is gone around."""
    end_layer: int
    """The last one."""

    def __post_init__(self) -> None:
        require(
            0 < self.selection_ratio < 1,
            f"The share of tokens of a TREAD route must be above 0 and below 1, got "
            f"{self.selection_ratio}. 0.5 is usual.",
        )


def routes_from_text(text: str) -> tuple[TreadRoute, ...]:
    """The routes of lines such as `0.5: 2 to -2`. Raises ValueError for another line."""
    routes = []
    for line in filter(str.strip, text.splitlines()):
        match = _ROUTE.fullmatch(line)
        if match is None:
            raise ValueError(
                f"The line '{line.strip()}' is no TREAD route. Write the share of the tokens, the "
                "first and the last block, such as 0.5: 2 to -2."
            )
        routes.append(
            TreadRoute(
                selection_ratio=float(match[1]), start_layer=int(match[2]), end_layer=int(match[3])
            )
        )
    return tuple(routes)


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """How the network is computed, and how much of it."""

    tread: tuple[TreadRoute, ...] = ()
    """Routes around blocks, in the order of the network; none trains all tokens everywhere."""
    checkpointing: str = "all"
    """Which blocks are computed again in backward, if gradient checkpointing is on. all: each by
    itself. interval: several in a row as one. selective: those whose activations do not fit."""
    checkpointing_interval: int = 2
    """interval: how many blocks are one. Fewer inputs are kept, and more is there while one of them
    is computed again."""
    compile: bool = False
    """Compile the blocks with torch.compile: the same mathematics with fewer kernels."""
    products: str = "dequantized"
    """dequantized: frozen weights are unpacked, and multiplied in the compute dtype. 8bit: they and
    what meets them are multiplied in 8 bits, which rounds more and needs an NVIDIA card."""

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("checkpointing", self.checkpointing, CHECKPOINTING),
            ("kind of products", self.products, PRODUCTS),
        ):
            require(value in known, f"Unknown {kind} '{value}'. Choose one of: {', '.join(known)}.")
        require(
            self.checkpointing_interval >= 2,
            f"The checkpointing interval must be 2 blocks or more, got "
            f"{self.checkpointing_interval}. One block by itself is the checkpointing 'all'.",
        )
        require(
            not self.compile or self.products == "dequantized",
            "Compiled blocks multiply in the compute dtype: turn compile off, or set products of "
            "Speed Settings to dequantized.",
        )
