"""The pixels of a picture: decoding, colours, crop and resize.

Sizes are (width, height) in pixels. "Upright" is a picture after its EXIF rotation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps
from torch import Tensor

from .buckets import Size, limited_size
from .checks import require

Crop = Literal[
    "center",
    "top",
    "bottom",
    "left",
    "right",
    "top left",
    "top right",
    "bottom left",
    "bottom right",
    "random",
]
CROPS: tuple[Crop, ...] = get_args(Crop)

Filter = Literal["lanczos", "bicubic"]
FILTERS: tuple[Filter, ...] = get_args(Filter)

TRANSFORM_VERSION = 2
"""Part of every latent's key. Raise it when `transform` gives other pixels.

2: embedded colour profiles are converted to sRGB.
"""

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height

_RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}

_PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""Pillow's modes for colour spaces, which are bytes 16 to 19 of a profile (ICC.1, 7.2)."""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Everything besides the picture that determines its pixels; hashed into the latent's key."""

    width: int
    height: int
    version: int = TRANSFORM_VERSION
    crop: Crop = "center"
    """The part that is kept of a picture of another shape: its side or corner, or a place drawn
    from `seed`."""
    filter: Filter = "lanczos"
    """How pixels are resampled."""
    max_side: int = 0
    """Pixels. Pictures with a longer side are shrunk to it before the crop; 0 is off."""
    flip: bool = False
    """Mirror left and right, after everything else."""
    seed: str = ""
    """Any text that belongs to the picture, as the hash of its content; for random crops only."""

    def __post_init__(self) -> None:
        require(
            self.crop in CROPS,
            f"The crop must be one of {', '.join(CROPS)}, got {self.crop!r}.",
        )
        require(
            self.filter in FILTERS,
            f"The filter must be one of {', '.join(FILTERS)}, got {self.filter!r}.",
        )
        require(
            self.max_side == 0 or 64 <= self.max_side,
            f"max_side must be 0 (off) or at least 64 pixels, got {self.max_side}.",
        )
        # Without one, all pictures would be cropped at one place; elsewhere it would split keys.
        assert bool(self.seed) == (self.crop == "random"), "a seed belongs to a random crop"

    def facts(self) -> dict[str, Any]:
        """What stands for this in a key: the size, the version, and whatever is not the default.

        So a new setting leaves the keys of latents that do not use it.
        """
        always = ("width", "height", "version")
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: v for name, (v, default) in values.items() if name in always or v != default}


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How the pictures of a dataset become pixels, their size aside."""

    crop: Crop = "center"
    """Which part is kept of a picture that has not the shape of its size."""
    filter: Filter = "lanczos"
    """How pixels are resampled."""
    max_side: int = 0
    """Pixels; a picture with a longer side is shrunk to it before the crop. 0 is off."""
    flip: bool = False
    """Train each picture also mirrored, every other time: a second entry in the cache."""

    def __post_init__(self) -> None:
        Transform(width=64, height=64, **self._facts("checked"))

    def transforms(self, size: Size, seed: str) -> tuple[Transform, ...]:
        """What is encoded of a picture at `size`; `seed` is a text that belongs to the picture."""
        facts = self._facts(seed)
        upright = Transform(width=size[0], height=size[1], **facts)
        return (upright, dataclasses.replace(upright, flip=True)) if self.flip else (upright,)

    def _facts(self, seed: str) -> dict[str, Any]:
        random = {"seed": seed} if self.crop == "random" else {}
        return {"crop": self.crop, "filter": self.filter, "max_side": self.max_side, **random}


def decode(data: bytes, path: str | Path) -> Image.Image:
    """The picture in a file's bytes, of an animation the first frame; `path` is for messages.

    Raises:
        ValueError: it is no picture, only a part of one, or has more pixels than Pillow allows.
    """
    try:
        with _refuse_truncated():
            image = Image.open(io.BytesIO(data))
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"The picture {path} has too many pixels to be opened. Make it smaller."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all three
        raise ValueError(
            f"The picture {path} is damaged, cut off or not a picture. Replace or remove it."
        ) from error
    return image


def display_size(image: Image.Image) -> Size:
    """Width and height as viewers show them: after the EXIF rotation."""
    width, height = image.size
    sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (height, width) if sideways else (width, height)


def has_unusable_profile(image: Image.Image) -> bool:
    """Whether the embedded colour profile is broken or not for such pictures, and so is ignored."""
    # Pillow leaves None where it could not even unpack the profile of a PNG.
    return "icc_profile" in image.info and _to_srgb(image) is None


def transform(image: Image.Image, how: Transform) -> Tensor:
    """Pixels [3, height, width], float32 in -1..1.

    The picture is turned by its EXIF rotation, converted to sRGB by its colour profile, laid over
    white where it is transparent, shrunk to `max_side`, resized until it covers the size, cropped,
    and flipped.
    """
    upright = upright_rgb(image)
    resampling = _RESAMPLING[how.filter]
    limited = limited_size(upright.size, how.max_side)
    if limited != upright.size:
        upright = upright.resize(limited, resampling)
    fitted = upright.resize((how.width, how.height), resampling, box=_crop(limited, how))
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))
    pixels = pixels.permute(2, 0, 1).contiguous() / 127.5 - 1
    return pixels.flip(2) if how.flip else pixels


def transform_mask(mask: Image.Image, how: Transform) -> Tensor:
    """Weights [1, height, width], float32 in 0..1, for what `transform` makes of a picture.

    Black is 0 and white 1, and what is transparent is 0; colour profiles are for colours and do not
    count. The mask has its own EXIF rotation and the shape of the picture, in any size. Shrinking
    takes the mean of the covered pixels, enlarging repeats them: no weight is made up.
    """
    upright = upright_greys(mask).convert("F")
    box = crop_box(upright.size, how)
    fitted = upright.resize((how.width, how.height), Image.Resampling.BOX, box=box)
    weights = torch.from_numpy(np.array(fitted, dtype=np.float32))[None] / 255
    return weights.flip(2) if how.flip else weights


def upright_rgb(image: Image.Image) -> Image.Image:
    """All of a picture as `transform` sees it: turned, in 8-bit sRGB, over white."""
    return _to_rgb(ImageOps.exif_transpose(image))


def upright_greys(mask: Image.Image) -> Image.Image:
    """All of a mask as `transform_mask` sees it: turned, in 8-bit greys, over black."""
    return _over(_eight_bit(ImageOps.exif_transpose(mask)), "black").convert("L")


def crop_box(size: Size, how: Transform) -> tuple[float, float, float, float]:
    """The part of an upright picture that is trained: left, top, right, bottom in its pixels."""
    limited = limited_size(size, how.max_side)
    left, top, right, bottom = _crop(limited, how)
    across, down = size[0] / limited[0], size[1] / limited[1]
    return left * across, top * down, min(right * across, size[0]), min(bottom * down, size[1])


def _crop(size: Size, how: Transform) -> tuple[float, float, float, float]:
    """The largest part with the shape of the transform's size, where its crop says."""
    aspect = how.width / how.height
    width, height = size
    if width / height > aspect:
        width = aspect * height
    elif width / height < aspect:
        height = width / aspect
    across, down = _place(how)
    left, top = (size[0] - width) * across, (size[1] - height) * down
    return left, top, left + width, top + height


def _place(how: Transform) -> tuple[float, float]:
    """Where the crop lies in what is left over, from 0 (left, top) to 1 (right, bottom)."""
    if how.crop == "random":
        drawn = hashlib.sha256(f"crop {how.seed}".encode()).digest()
        across, down = (int.from_bytes(part, "big") for part in (drawn[:4], drawn[4:8]))
        return across / 0xFFFFFFFF, down / 0xFFFFFFFF
    across = 0.0 if "left" in how.crop else 1.0 if "right" in how.crop else 0.5
    down = 0.0 if "top" in how.crop else 1.0 if "bottom" in how.crop else 0.5
    return across, down


def _to_rgb(image: Image.Image) -> Image.Image:
    """The picture in 8-bit sRGB, over white."""
    to_srgb = _to_srgb(image)
    image = _eight_bit(image)
    if to_srgb is None:
        return _over(image, "white")
    layer = image.convert("RGBA") if image.has_transparency_data else image
    colours = to_srgb.apply(layer.convert(to_srgb.input_mode))
    if layer is not image:
        colours.putalpha(layer.getchannel("A"))
    return _over(colours, "white")


def _to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """How the picture's colours become sRGB, or None without a profile that can be used."""
    data = image.info.get("icc_profile") or b""
    mode = _PROFILE_MODES.get(data[16:20])
    if mode is None or not _fits(mode, image):  # left behind by an editor
        return None
    return _profile_to_srgb(data, mode)


@lru_cache(maxsize=16)  # many pictures have the profile of one camera
def _profile_to_srgb(data: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        # Perceptual is what browsers show; for the profiles of cameras and screens all are equal.
        return ImageCms.ImageCmsTransform(profile, srgb, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    except (OSError, ValueError):
        return None


def _fits(mode: str, image: Image.Image) -> bool:
    if "CMYK" in (mode, image.mode):
        return mode == image.mode
    is_grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    return mode == "RGB" or is_grey  # greys are colours too


def _eight_bit(image: Image.Image) -> Image.Image:
    if not image.mode.startswith("I"):
        return image
    # Pillow clips 16-bit greys to 255 in convert(); 65535 / 257 = 255 keeps their range.
    grey = np.clip(np.asarray(image, dtype=np.float32) / 257, 0, 255)
    return Image.fromarray(grey.round().astype(np.uint8))


def _over(image: Image.Image, background: str) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


@contextmanager
def _refuse_truncated() -> Iterator[None]:
    # A global switch of Pillow: other packs set it to accept half a picture without a word.
    previous = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = previous
