"""A picture with what training sees of it drawn on: its crop and its mask."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .buckets import Size
from .pictures import Transform, crop_box, upright_greys, upright_rgb

SHADE = (32, 38, 46)
"""Outside the crop."""
TINT = (176, 52, 92)
"""Where a mask says that nothing counts."""
OUTLINE = (255, 255, 255)
OUTLINE_PX = 2
_SHADED, _TINTED, _HATCHED = 0.68, 0.22, 0.5
_HATCH_PX = 9


def marked_picture(
    image: Image.Image, mask: Image.Image | None, how: Transform, box: Size
) -> Image.Image:
    """The upright picture, as large as `box` allows: dark outside of the crop, with a line around
    it, and hatched in proportion where the mask is black."""
    upright = upright_rgb(image)
    size = fitted_size(upright.size, box)
    pixels = np.array(upright.resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
    if mask is not None:
        greys = upright_greys(mask).resize(size, Image.Resampling.BOX)
        pixels = _mixed(pixels, TINT, hatching(size) * (1 - np.asarray(greys, np.float32) / 255))
    left, top, right, bottom = scaled_crop(upright.size, how, size)
    outside = np.ones(size[::-1], np.float32)
    outside[top:bottom, left:right] = 0
    marked = Image.fromarray(_mixed(pixels, SHADE, outside * _SHADED).round().astype(np.uint8))
    pen = ImageDraw.Draw(marked)
    pen.rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE, width=OUTLINE_PX)
    return marked


def fitted_size(size: Size, box: Size) -> Size:
    """The largest (width, height) of the same shape within `box`."""
    factor = min(box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def scaled_crop(size: Size, how: Transform, shown: Size) -> tuple[int, int, int, int]:
    """What is trained of a picture of `size`, in whole pixels of the picture shown at `shown`."""
    left, top, right, bottom = crop_box(size, how)
    across, down = shown[0] / size[0], shown[1] / size[1]
    left, top = round(left * across), round(top * down)
    return left, top, max(left + 1, round(right * across)), max(top + 1, round(bottom * down))


def hatching(size: Size) -> np.ndarray:
    """How much of the tint is seen at each pixel [height, width], 0..1: diagonal stripes."""
    down, across = np.indices(size[::-1])
    is_stripe = (across + down) % _HATCH_PX < _HATCH_PX // 3
    return np.where(is_stripe, _HATCHED, _TINTED).astype(np.float32)


def _mixed(pixels: np.ndarray, colour: tuple[int, int, int], share: np.ndarray) -> np.ndarray:
    return pixels + (np.array(colour, np.float32) - pixels) * share[..., None]
