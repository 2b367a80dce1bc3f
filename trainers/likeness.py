"""How like pictures are to training pictures: whether a LoRA draws one that it learned by heart.

Shapes: N pictures, M training pictures, D numbers of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checks import require
from .dataset import Dataset, open_picture
from .pictures import transform

NEARLY_THE_SAME = 0.95
"""From this likeness on, by pixels or by embeddings, two pictures are taken for copies. By pixels,
different ones of ComfyUI's image templates reach 0.66; blurred or upscaled ones 0.96 to 0.99."""
_SIDE = 32
_ROWS = 256


@dataclass(frozen=True)
class Nearest:
    """The training picture that is most like a picture."""

    likeness: float
    """-1..1; 1 is the same."""
    index: int
    """Of the training picture."""


def trained_pictures(dataset: Dataset) -> Iterator[tuple[str, Tensor]]:
    """File name and pixels [H, W, 3] in 0..1, as they are trained, of every picture once.

    Those of regularization are left out: the LoRA shall draw what is like them.

    Raises:
        ValueError: a file is gone, damaged, or not the one that the dataset was made of.
    """
    seen: set[str] = set()
    for subset in dataset.subsets:
        for record in () if subset.is_regularization else subset.records:
            if record.content in seen:
                continue
            seen.add(record.content)
            how, *_ = subset.pictures.transforms(subset.size_of(record), record.content)
            pixels = transform(open_picture(record), how)
            yield Path(record.path).name, (pixels.movedim(0, -1) + 1) / 2


def thumbnail(pixels: Tensor) -> Tensor:
    """A picture [H, W, 3] of any size as a vector [D]: the middle square in 32 x 32 means, their
    own mean taken off. The cosine of two of them is the correlation of the pictures: brightness
    and contrast do not count. Of a picture in one colour it is 0.
    """
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side].movedim(-1, 0).float()
    small = torch.nn.functional.adaptive_avg_pool2d(square, _SIDE).flatten()
    return small - small.mean()


def nearest(pictures: Tensor, trained: Tensor) -> list[Nearest]:
    """For each of `pictures` [N, D] the one of `trained` [M, D] with the largest cosine.

    Raises:
        ValueError: a number is not finite.
    """
    values, indices = (_unit(pictures) @ _unit(trained).T).max(dim=1)
    return [Nearest(*pair) for pair in zip(values.tolist(), indices.tolist(), strict=True)]


def most_alike(trained: Tensor) -> float | None:
    """The largest cosine of two different rows of [M, D]; None if there is only one row.

    Raises:
        ValueError: a number is not finite.
    """
    unit = _unit(trained)
    if len(unit) < 2:
        return None
    largest = -1.0
    for rows in torch.arange(len(unit)).split(_ROWS):
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -1
        largest = max(largest, float(cosines.max()))
    return largest


def _unit(vectors: Tensor) -> Tensor:
    require(
        bool(torch.isfinite(vectors).all()),
        "The likeness of pictures cannot be told: the CLIP vision model gives values that are not "
        "finite. Choose another file of it.",
    )
    return torch.nn.functional.normalize(vectors.float(), dim=1)
