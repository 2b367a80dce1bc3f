"""The size a picture is trained at. The pixels it has there are in `pictures`.

Sizes are (width, height) in pixels, after the EXIF rotation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, get_args

from .checks import require

Size = tuple[int, int]

Mode = Literal["fixed", "buckets", "square", "preserved", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)

STEP = 16
"""Sides are a multiple of it: the autoencoder shrinks by 8 and FLUX reads latents two by two."""

STEPS = (STEP, 64)

MIN_SIDE = 64
"""Pixels. No size is made smaller than this to spare a picture from being enlarged."""


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The sizes a dataset is trained at."""

    width: int = 512
    """Pixels, a multiple of `step`."""
    height: int = 768
    """Pixels, a multiple of `step`."""
    mode: Mode = "fixed"
    """What a picture's size is. All but `fixed` have about the area of width x height:

    - `fixed`: width x height for every picture.
    - `buckets`: the size of `bucket_sizes` whose shape is nearest to the picture's.
    - `square`: one square for every picture.
    - `preserved`: the picture's own shape, each side rounded to the step.
    - `random`: any size of `bucket_sizes`, drawn for each picture.
    """
    max_aspect: float = 2.0
    """Ratio of long to short side of the longest size; longer pictures are cropped to it. The shape
    of width x height is always allowed, and sides are rounded to the step."""
    step: int = STEP
    """16 or 64 pixels. With 64 there are fewer buckets, so batches are fuller and crops larger."""
    upscale: bool = True
    """Whether pictures smaller than their size are enlarged to it. See `size_for`."""

    def __post_init__(self) -> None:
        require(self.step in STEPS, f"The step of sizes must be 16 or 64 pixels, got {self.step}.")
        for name, side in (("width", self.width), ("height", self.height)):
            require(
                64 <= side <= 8192 and side % self.step == 0,
                f"The {name} must be a multiple of {self.step} between 64 and 8192 pixels, "
                f"got {side}.",
            )
        require(
            self.mode in MODES,
            f"The size mode must be one of {', '.join(MODES)}, got {self.mode!r}.",
        )
        require(self.max_aspect >= 1, f"max_aspect must be 1 or more, got {self.max_aspect}.")

    def at(self, size: Size) -> Resolution:
        """The same with another (width, height)."""
        return dataclasses.replace(self, width=size[0], height=size[1])

    def size_for(self, width: int, height: int, seed: str = "") -> Size:
        """The size at which a picture of `width` x `height` is trained.

        `seed` is any text that belongs to the picture, as the hash of its content; the mode
        `random` draws from it alone.

        Without `upscale`, both sides of a size that is larger than the picture shrink by the one
        factor that makes it fit, and are rounded down to the step: the shape stays. The factor is
        never so small that the shorter side gets less than 64 pixels, so pictures smaller than
        that are enlarged all the same; `is_enlarged` tells.
        """
        size = self._full_size(width, height, seed)
        return size if self.upscale else _shrunk_to_fit(size, (width, height), self.step)

    def _full_size(self, width: int, height: int, seed: str) -> Size:
        area = self.width * self.height
        if self.mode == "fixed":
            return self.width, self.height
        if self.mode == "square":
            side = _rounded(math.sqrt(area), self.step)
            return side, side
        if self.mode == "preserved":
            limit = _aspect_limit(self.width, self.height, self.max_aspect)
            aspect = min(max(width / height, 1 / limit), limit)
            sides = math.sqrt(area * aspect), math.sqrt(area / aspect)
            return _rounded(sides[0], self.step), _rounded(sides[1], self.step)
        sizes = bucket_sizes(self.width, self.height, max_aspect=self.max_aspect, step=self.step)
        if self.mode == "random":
            drawn = hashlib.sha256(f"size {seed}".encode()).digest()[:8]
            return sizes[int.from_bytes(drawn, "big") % len(sizes)]
        return nearest_bucket(width, height, sizes)


def parse_sizes(text: str) -> tuple[Size, ...]:
    """The sizes in a text such as "768x768, 1024x1024"; none in an empty one.

    Raises:
        ValueError: a part of it is no size.
    """
    sizes = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        width, times, height = part.lower().partition("x")
        require(
            times == "x" and width.strip().isdecimal() and height.strip().isdecimal(),
            f"{part!r} is no size. Write sizes as width x height with commas between them, such as "
            "768x768, 1024x1024.",
        )
        sizes.append((int(width), int(height)))
    return tuple(sizes)


@lru_cache  # asked once per picture
def bucket_sizes(
    width: int, height: int, *, max_aspect: float = 2.0, step: int = STEP
) -> tuple[Size, ...]:
    """All sizes with about the area of `width` x `height`, sorted; that size is always among them.

    Each side is a multiple of `step`, and the height is the one that comes closest to the area.
    """
    area = width * height
    aspect = _aspect_limit(width, height, max_aspect)
    narrowest = math.ceil(math.sqrt(area / aspect) / step)
    # No wider than a size of one step in height, which a large max_aspect would ask for.
    widest = math.floor(min(math.sqrt(area * aspect), area / step) / step)
    columns = (step * count for count in range(narrowest, widest + 1))
    return tuple(sorted({(w, step * round(area / w / step)) for w in columns} | {(width, height)}))


def nearest_bucket(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """The size whose aspect ratio is nearest on a log scale, so that portrait equals landscape."""
    wanted = math.log(width / height)
    ordered, aspects = _by_aspect(sizes)
    above = bisect_left(aspects, wanted)
    below = bisect_left(aspects, aspects[above - 1]) if above else 0  # the first of equal shapes
    near = ordered[below], ordered[min(above, len(ordered) - 1)]
    return min(near, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), size))


@lru_cache  # 100,000 pictures ask
def _by_aspect(sizes: tuple[Size, ...]) -> tuple[list[Size], list[float]]:
    ordered = sorted(sizes, key=lambda size: (math.log(size[0] / size[1]), size))
    return ordered, [math.log(width / height) for width, height in ordered]


def limited_size(size: Size, max_side: int) -> Size:
    """`size` shrunk in proportion until no side is longer than `max_side` pixels; 0 is no limit."""
    longest = max(size)
    if not max_side or longest <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longest)) for side in size)
    return width, height


def is_enlarged(picture: Size, size: Size) -> bool:
    """Whether a picture of this size has to be enlarged to be trained at `size`."""
    return picture[0] < size[0] or picture[1] < size[1]


def _aspect_limit(width: int, height: int, max_aspect: float) -> float:
    return max(max_aspect, width / height, height / width)


def _rounded(side: float, step: int) -> int:
    return max(step, step * round(side / step))


def _shrunk_to_fit(size: Size, picture: Size, step: int) -> Size:
    # Fractions, for a side that shrinks to a multiple of the step must not land just below it.
    fitting = min(Fraction(picture[0], size[0]), Fraction(picture[1], size[1]))
    factor = max(fitting, Fraction(MIN_SIDE, min(size)))
    if factor >= 1:
        return size
    width, height = (step * (side * factor // step) for side in size)
    return width, height
