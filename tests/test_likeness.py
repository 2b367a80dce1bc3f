"""Likeness to training pictures against correlations by NumPy and resampling by Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.dataset import Dataset
from atelier.trainers.image_folder import image_folder
from atelier.trainers.likeness import most_alike, nearest, thumbnail, trained_pictures
from graphs import write_pictures
from PIL import Image
from torch import Tensor


def smooth(seed: int, height: int, width: int) -> Tensor:
    """[H, W, 3] in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    size = (height, width)
    return torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0].movedim(0, -1)


def correlation(one: Tensor, other: Tensor) -> float:
    """Of two pictures of one shape, by Pillow and NumPy."""

    def small(pixels: Tensor) -> np.ndarray:
        eight_bit = Image.fromarray((pixels * 255).round().byte().numpy())
        side = min(eight_bit.size)
        left, top = (eight_bit.width - side) // 2, (eight_bit.height - side) // 2
        square = eight_bit.crop((left, top, left + side, top + side))
        return np.asarray(square.resize((32, 32), Image.Resampling.BOX), dtype=float).ravel()

    return float(np.corrcoef(small(one), small(other))[0, 1])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 192), (300, 200)])
def test_thumbnails_have_the_correlation_of_the_pictures(height: int, width: int) -> None:
    pictures = [smooth(seed, height, width) for seed in range(3)]
    vectors = torch.stack([thumbnail(picture) for picture in pictures])
    found = nearest(vectors[:1], vectors[1:])[0]
    expected = [correlation(pictures[0], other) for other in pictures[1:]]
    assert found.likeness == pytest.approx(max(expected), abs=0.01)
    assert found.index == int(np.argmax(expected))


def test_a_copy_is_found_in_another_size_brightness_and_contrast() -> None:
    trained = torch.stack([thumbnail(smooth(seed, 64, 64)) for seed in range(5)])
    large = torch.nn.functional.interpolate(smooth(3, 64, 64).movedim(-1, 0)[None], (512, 512))
    copy = thumbnail(0.2 + 0.5 * large[0].movedim(0, -1))
    (found,) = nearest(copy[None], trained)
    assert found.index == 3
    assert found.likeness > 0.99


def test_a_picture_in_one_colour_is_like_none() -> None:
    plain = thumbnail(torch.full((64, 64, 3), 0.5))
    (found,) = nearest(plain[None], thumbnail(smooth(0, 64, 64))[None])
    assert found.likeness == 0


def test_the_two_that_are_most_alike_are_found_among_many() -> None:
    vectors = torch.randn(600, 40, generator=torch.Generator().manual_seed(0))
    vectors[599] = vectors[3] + 0.3 * vectors[100]
    unit = vectors.double().numpy() / np.linalg.norm(vectors.double().numpy(), axis=1)[:, None]
    cosines = unit @ unit.T - 2 * np.eye(600)
    assert most_alike(vectors) == pytest.approx(cosines.max(), abs=1e-5)
    assert most_alike(vectors[:1]) is None


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^The likeness of pictures cannot be told: the CLIP vi"):
        nearest(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))


def test_each_trained_picture_comes_once_as_it_is_trained(tmp_path: Path) -> None:
    write_pictures(tmp_path / "mine", count=3, size=96)
    write_pictures(tmp_path / "others", count=4, size=96)
    square = Resolution(width=64, height=64)
    mine = image_folder(tmp_path / "mine", resolution=square)
    others = image_folder(tmp_path / "others", resolution=square)
    other = Dataset(subsets=(others,)).scheduled(others.schedule, is_regularization=True)
    dataset = Dataset(subsets=(mine, *other.subsets)).at_sizes([(64, 96)])
    found = list(trained_pictures(dataset))
    assert [name for name, _ in found] == ["0.png", "1.png", "2.png"]
    for name, pixels in found:
        picture = Image.open(tmp_path / "mine" / name).convert("RGB")
        resized = picture.resize((64, 64), Image.Resampling.LANCZOS)
        assert torch.equal((pixels * 255).round().byte(), torch.from_numpy(np.array(resized)))
