"""How strongly a LoRA acts in each part of a network: lines such as `double_blocks.0-9: 0.5`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class Pattern:
    """Parts of a name in a row, with dots between: a word, in which `*` stands for any letters, or
    a range of numbers such as `0-9`, both ends included."""

    text: str

    def matches(self, name: str) -> bool:
        """Whether the parts of the pattern are in `name`, one after the other."""
        wanted, parts = self.text.split("."), name.split(".")
        starts = range(len(parts) - len(wanted) + 1)
        return any(all(map(_is_part, wanted, parts[start:])) for start in starts)


@dataclass(frozen=True, kw_only=True)
class BlockWeight:
    """The weight of every name that holds the pattern."""

    pattern: str
    weight: float

    def matches(self, name: str) -> bool:
        """Whether a `Pattern` of this text does."""
        return Pattern(self.pattern).matches(name)


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """The lines of a user, of which the last one that matches holds."""

    lines: tuple[BlockWeight, ...] = ()

    def of(self, name: str) -> float:
        """The weight of a name such as `double_blocks.0.img_attn.qkv`; 1 where no line matches."""
        return next((line.weight for line in reversed(self.lines) if line.matches(name)), 1.0)

    def matching_none(self, names: Iterable[str]) -> list[str]:
        """The patterns that match none of these names."""
        known = list(names)
        return [line.pattern for line in self.lines if not any(map(line.matches, known))]


def parse_block_weights(text: str) -> BlockWeights:
    """The weights that `text` gives, one `pattern: weight` in a line; empty lines are none.

    Raises:
        ValueError: if a line is no pattern with a number.
    """
    return BlockWeights(lines=tuple(_parse(line) for line in text.splitlines() if line.strip()))


def _parse(line: str) -> BlockWeight:
    pattern, _, number = (part.strip() for part in line.rpartition(":"))
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    require(
        bool(pattern) and math.isfinite(weight),
        f"Each line of block_weights is a part of the model's names, a colon and a number, such as "
        f"'double_blocks.0-9: 0.5', got {line.strip()!r}.",
    )
    return BlockWeight(pattern=pattern, weight=weight)


def _is_part(wanted: str, part: str) -> bool:
    span = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if span:
        return part.isdecimal() and int(span[1]) <= int(part) <= int(span[2])
    return re.fullmatch(re.escape(wanted).replace(r"\*", ".*"), part) is not None
