"""The size a picture is trained at, and the pixels it has there.

Sizes are (width, height) in pixels, after the EXIF rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .config import require

Size = tuple[int, int]

STEP = 16
"""Sides are a multiple of it: the autoencoder shrinks by 8 and FLUX reads latents two by two."""

TRANSFORM_VERSION = 1
"""Part of every latent's key. Raise it when `transform` gives other pixels."""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """The sizes a dataset is trained at."""

    width: int = 512
    """Pixels, a multiple of 16."""
    height: int = 768
    """Pixels, a multiple of 16."""
    mode: Literal["fixed", "buckets"] = "fixed"
    """`fixed` crops every picture to width x height; `buckets` keeps its shape at that area."""
    max_aspect: float = 2.0
    """Ratio of long to short side of the longest bucket; longer pictures are cropped to it."""

    def __post_init__(self) -> None:
        for name, side in (("width", self.width), ("height", self.height)):
            require(
                64 <= side <= 8192 and side % STEP == 0,
                f"The {name} must be a multiple of {STEP} between 64 and 8192 pixels, got {side}.",
            )
        require(
            self.mode in ("fixed", "buckets"),
            f"The size mode must be 'fixed' or 'buckets', got {self.mode!r}.",
        )
        require(self.max_aspect >= 1, f"max_aspect must be 1 or more, got {self.max_aspect}.")

    def size_for(self, width: int, height: int) -> Size:
        """The size at which a picture of `width` x `height` is trained."""
        if self.mode == "fixed":
            return self.width, self.height
        sizes = bucket_sizes(self.width, self.height, max_aspect=self.max_aspect)
        return nearest_bucket(width, height, sizes)


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Everything besides the picture that determines its pixels; hashed into the latent's key."""

    width: int
    height: int
    version: int = TRANSFORM_VERSION


@lru_cache  # asked once per picture
def bucket_sizes(width: int, height: int, *, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """All sizes with about the area of `width` x `height`, sorted; that size is always among them.

    Each side is a multiple of STEP, and the height is the one that comes closest to the area.
    """
    area = width * height
    aspect = max(max_aspect, width / height, height / width)
    narrowest = math.ceil(math.sqrt(area / aspect) / STEP)
    widest = math.floor(math.sqrt(area * aspect) / STEP)
    columns = (STEP * count for count in range(narrowest, widest + 1))
    return tuple(sorted({(w, STEP * round(area / w / STEP)) for w in columns} | {(width, height)}))


def nearest_bucket(width: int, height: int, sizes: tuple[Size, ...]) -> Size:
    """The size whose aspect ratio is nearest on a log scale, so that portrait equals landscape."""
    wanted = math.log(width / height)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - wanted), size))


def display_size(image: Image.Image) -> Size:
    """Width and height as viewers show them: after the EXIF rotation."""
    width, height = image.size
    sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def transform(image: Image.Image, width: int, height: int) -> Tensor:
    """Pixels [3, height, width], float32 in -1..1.

    The picture is turned by its EXIF rotation, laid over white where it is transparent, resized
    (Lanczos) until it covers the size, and cropped at the centre.
    """
    upright = ImageOps.exif_transpose(image)
    fitted = ImageOps.fit(_to_rgb(upright), (width, height), method=Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys to 255 in convert(); 65535 / 257 = 255 keeps their range.
        grey = np.clip(np.asarray(image, dtype=np.float32) / 257, 0, 255)
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")
