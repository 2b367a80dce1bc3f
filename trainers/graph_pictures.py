"""Pictures that a graph made as a dataset.

Their files have eight bits a channel, as ComfyUI's Save Image writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from .buckets import Resolution
from .captions import CAPTION_SOURCES, CaptionSettings
from .checks import require
from .content_hashes import ContentHashes
from .dataset import Subset
from .image_folder import make_records
from .masks import Mask
from .metadata_files import one_or_more
from .picture_files import PictureFiles
from .pictures import PictureSettings
from .progress import OnProgress
from .scan import Picture

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


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
    index_folder: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Subset:
    """Pictures [H, W, C] in 0..1, each with its caption, or all with one.

    `masks` [H, W] in 0..1, one for each picture if any, have 1 where the picture counts. Where the
    captions come from is not looked at in `captions`. `index_folder` remembers hashes.

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
        kept.append(files.keep_pixels(_eight_bit_picture(image)))
        if masks:
            weights.append(files.keep_pixels(_eight_bit_mask(masks[index], kept[-1], index)))
    report(num, num)
    hashes = ContentHashes.in_folder(index_folder)
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
            [None] * num,
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
