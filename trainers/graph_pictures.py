"""Pictures that a graph made, as files: a dataset needs some that can be read again.

They lie as PNG under hashes of their pixels, so the same picture is written once. Their bytes have
eight bits a channel, as ComfyUI's Save Image writes them.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from .buckets import Resolution
from .captions import CAPTION_SOURCES, CaptionSettings
from .config import require
from .dataset import Subset, make_records
from .files import write_atomically
from .masks import Mask
from .metadata_files import one_or_more
from .pictures import PictureSettings
from .scan import ContentHashes, OnProgress, Picture

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_COMPRESS_LEVEL = 1
"""Of PNG: twice as fast as the usual 4, for a few percent of size."""


class PictureFiles:
    """A folder of pictures by their pixels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: set[Path] = set()
        self._generation = ""

    def keep(self, pixels: np.ndarray) -> Picture:
        """Write 8-bit pixels [H, W] or [H, W, C], unless they are there.

        Raises:
            ValueError: the disk is full or refuses.
        """
        name = hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).hexdigest()[:32]
        path = self._folder / f"{name}.png"
        if not path.is_file():
            image = Image.fromarray(pixels)
            write_atomically(
                path,
                lambda temporary: image.save(temporary, "PNG", compress_level=_COMPRESS_LEVEL),
            )
        self._kept.add(path)
        facts = path.stat()
        height, width = pixels.shape[:2]
        has_alpha = pixels.shape[2:] == (4,)
        return Picture(str(path), facts.st_size, facts.st_mtime_ns, width, height, has_alpha, 1)

    def generation(self) -> str:
        """Changes when a file is gone that was kept here before."""
        if not all(path.is_file() for path in self._kept):
            self._kept, self._generation = set(), uuid.uuid4().hex
        return self._generation


def graph_pictures(
    images: Sequence[Tensor],
    texts: Sequence[str],
    files: PictureFiles,
    *,
    resolution: Resolution,
    pictures: PictureSettings,
    captions: CaptionSettings,
    masks: Sequence[Tensor] = (),
    repeats: int = 1,
    contents_file: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Subset:
    """Pictures [H, W, C] in 0..1, each with its caption, or all with one.

    `masks` [H, W] in 0..1, one for each picture if any, have 1 where the picture counts. Where the
    captions come from is not looked at in `captions`. `contents_file` remembers hashes.

    Raises:
        ValueError: the numbers of captions or masks do not fit, a mask has another size than its
            picture, or a picture cannot be written.
    """
    num = len(images)
    require(num > 0, "There are no pictures. Connect an image to images.")
    require(
        len(texts) in (1, num),
        f"There are {len(texts)} captions for {num} pictures. Give one for each, or one for all.",
    )
    require(
        len(masks) in (0, num),
        f"There are {len(masks)} masks for {num} pictures. Give one for each, or none.",
    )
    report = on_progress or (lambda done, total: None)
    kept, weights = [], []
    for index, image in enumerate(images):
        report(index, num)
        kept.append(files.keep(_eight_bit_picture(image)))
        if masks:
            weights.append(files.keep(_eight_bit_mask(masks[index], kept[-1], index)))
    report(num, num)
    hashes = ContentHashes(contents_file)
    mask_hashes = hashes.of_all(weights).digests
    written = [
        one_or_more(text.splitlines() if captions.lines == "each" else [text]) for text in texts
    ]
    is_silent = captions.source != CAPTION_SOURCES[0]
    unused = "The source of Caption Settings has no effect here: the captions are those of texts."
    return Subset(
        records=make_records(
            kept,
            written * (num if len(written) == 1 else 1),
            hashes.of_all(kept).digests,
            [Mask(path=p.path, content=c) for p, c in zip(weights, mask_hashes, strict=True)]
            or [None] * num,
            captions=captions,
            repeats=repeats,
        ),
        resolution=resolution,
        name="images",
        pictures=pictures,
        captions=captions,
        told=(unused,) if is_silent else (),
    )


def _eight_bit_picture(image: Tensor) -> np.ndarray:
    channels = image.shape[-1]
    require(
        channels in _MODES,
        f"An image has {channels} channels. Pictures have 1, 3 or 4: grey, RGB or RGB with alpha.",
    )
    pixels = _eight_bit(image)
    return pixels[..., 0] if channels == 1 else pixels


def _eight_bit_mask(mask: Tensor, picture: Picture, index: int) -> np.ndarray:
    height, width = mask.shape
    require(
        (width, height) == (picture.width, picture.height),
        f"The mask {index + 1} has {width}x{height} pixels and its picture "
        f"{picture.width}x{picture.height}. Make them equal.",
    )
    return _eight_bit(mask)


def _eight_bit(values: Tensor) -> np.ndarray:
    # The numbers of ComfyUI's Save Image, which cuts off the fraction.
    return np.clip(255.0 * values.cpu().numpy(), 0, 255).astype(np.uint8)
