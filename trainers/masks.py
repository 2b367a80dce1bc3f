"""Masks: which parts of a picture count in the loss. White counts, black does not.

A mask is a picture of the same size, in a folder of masks under the same name, or the transparency
of the picture itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .content_hashes import ContentHashes
from .paired_folder import has_subfolders, name_below, paired_folder
from .pictures import Transform, decode, transform_mask
from .progress import OnProgress
from .scan import Picture

ALPHA = "alpha channel"
"""The source of masks that is no folder."""

_LATENT_STEP = 8
"""Pixels along a side of one latent."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Where a record's mask lies."""

    path: str
    """Absolute path of the picture that is the mask, or has it as its alpha channel."""
    content: str
    """SHA-256 of the file's bytes, in hex."""
    is_alpha: bool = False


def alpha_masks(pictures: Sequence[Picture], contents: Sequence[str]) -> list[Mask | None]:
    """The transparency of each picture; None where all of it is seen."""
    return [
        Mask(path=picture.path, content=content, is_alpha=True) if picture.has_alpha else None
        for picture, content in zip(pictures, contents, strict=True)
    ]


def folder_masks(
    pictures: Iterable[Picture],
    folder: str | Path,
    root: str,
    index_folder: Path | None,
    hashes: ContentHashes,
    on_progress: OnProgress | None,
) -> list[Mask | str]:
    """The mask of each picture: that of its path below `root` in `folder`, whatever the extension;
    or the sentence that says what is wrong.

    Raises:
        ValueError: the folder is missing, or two masks have one name.
    """
    pictures = list(pictures)
    paired = paired_folder(
        folder,
        recursive=has_subfolders(pictures, root),
        index_folder=index_folder,
        hashes=hashes,
        on_progress=on_progress,
    )

    def mask_of(picture: Picture) -> Mask | str:
        name = name_below(root, picture.path)
        found = paired.pictures.get(name)
        if found is None:
            missing = (
                f"The picture {picture.path} has no mask in {paired.folder}. Put one there under "
                "the same name: white is trained, black is not."
            )
            return paired.bad.get(name, missing)
        if (found.width, found.height) != (picture.width, picture.height):
            return (
                f"The mask {found.path} has {found.width}x{found.height} pixels and its picture "
                f"{picture.width}x{picture.height}. Make them equal."
            )
        return Mask(path=found.path, content=paired.contents[name])

    return [mask_of(picture) for picture in pictures]


def mask_image(mask: Mask, data: bytes) -> Image.Image:
    """The picture that is the mask, from the bytes of its file.

    Raises:
        ValueError: it is no picture.
    """
    image = decode(data, mask.path)
    if mask.is_alpha:
        image = ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")
    return image


def latent_weights(mask: Image.Image, how: Transform) -> Tensor:
    """Weights [h, w] in 0..1 of the latents of a picture that `how` transforms: the mean of the
    pixels under each."""
    return torch.nn.functional.avg_pool2d(transform_mask(mask, how), _LATENT_STEP)[0]
