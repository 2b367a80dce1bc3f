"""Masks: which one belongs to a picture, what it weighs, and what is refused in which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.caching import cache_latents
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import Dataset, PictureSettings, Subset
from atelier.trainers.image_folder import image_folder
from atelier.trainers.masks import ALPHA
from PIL import Image

SIZE = (128, 96)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """cat.jpg and dog.png, whose masks are cat.png (left half white) and dog.png (grey)."""
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    folder.mkdir()
    masks.mkdir()
    Image.new("RGB", SIZE, "red").save(folder / "cat.jpg")
    Image.new("RGB", SIZE, "blue").save(folder / "dog.png")
    half = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    half[:, : SIZE[0] // 2] = 255
    Image.fromarray(half).save(masks / "cat.png")
    Image.new("L", SIZE, 51).save(masks / "dog.png")
    return folder


def read(folder: Path, masks: str | Path | None, **options: object) -> Subset:
    return image_folder(
        folder,
        resolution=Resolution(width=SIZE[0], height=SIZE[1]),
        captions=CaptionSettings(missing="empty"),
        masks=masks,
        **options,
    )


def cached_weights(subset: Subset, folder: Path) -> list[list[torch.Tensor]]:
    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = torch.zeros(len(pixels), 16, pixels.shape[2] // 8, pixels.shape[3] // 8)
        return latents, latents

    cache = cache_latents(Dataset(subsets=(subset,)), encode, "vae", folder)
    return [[cache.load_mask(key) for key in entry.masks] for entry in cache.entries]


def left_half() -> torch.Tensor:
    weights = torch.zeros(12, 16)
    weights[:, :8] = 1
    return weights


def test_a_mask_weighs_the_latents_of_its_picture(pictures: Path, tmp_path: Path) -> None:
    (cat,), (dog,) = cached_weights(read(pictures, tmp_path / "masks"), tmp_path / "cache")
    assert torch.equal(cat, left_half())
    torch.testing.assert_close(dog, torch.full((12, 16), 0.2))


def test_a_latent_weighs_the_mean_of_its_pixels(pictures: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, SIZE[::-1], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "masks" / "cat.png")
    (cat,), _ = cached_weights(read(pictures, tmp_path / "masks"), tmp_path / "cache")
    expected = pixels.reshape(12, 8, 16, 8).mean((1, 3)) / 255
    np.testing.assert_allclose(cat.numpy(), expected, atol=1e-5)


def test_a_mirrored_picture_has_a_mirrored_mask(pictures: Path, tmp_path: Path) -> None:
    subset = read(pictures, tmp_path / "masks", pictures=PictureSettings(flip=True))
    (upright, mirrored), _ = cached_weights(subset, tmp_path / "cache")
    assert torch.equal(upright, left_half())
    assert torch.equal(mirrored, left_half().flip(1))


def test_a_mask_is_cropped_as_its_picture(pictures: Path, tmp_path: Path) -> None:
    """The right square of the picture has 32 of 96 columns that are white."""
    subset = image_folder(
        pictures,
        resolution=Resolution(width=96, height=96),
        captions=CaptionSettings(missing="empty"),
        pictures=PictureSettings(crop="right"),
        masks=tmp_path / "masks",
    )
    (cat,), _ = cached_weights(subset, tmp_path / "cache")
    assert cat.shape == (12, 12)
    assert torch.equal(cat[0], torch.tensor([1.0] * 4 + [0.0] * 8))


@pytest.mark.parametrize("orientation", [1, 6], ids=["upright", "on its side"])
def test_transparency_is_a_mask(tmp_path: Path, orientation: int) -> None:
    """Of a picture whose stored left half is seen; turned by EXIF, that is its upper half."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.full((SIZE[1], SIZE[0], 4), 255, np.uint8)
    pixels[:, SIZE[0] // 2 :, 3] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "cat.png", exif=exif)
    Image.new("RGB", SIZE).save(folder / "dog.jpg")
    upright = SIZE if orientation == 1 else SIZE[::-1]
    subset = image_folder(
        folder,
        resolution=Resolution(width=upright[0], height=upright[1]),
        captions=CaptionSettings(missing="empty"),
        masks=ALPHA,
    )
    (cat,), dog = cached_weights(subset, tmp_path / "cache")
    assert torch.equal(cat, left_half() if orientation == 1 else left_half().T)
    assert not dog  # all of it is seen


def test_another_mask_encodes_no_picture_again(pictures: Path, tmp_path: Path) -> None:
    first = read(pictures, None)
    plain = Dataset(subsets=(first,))
    encoded = []

    def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        encoded.append(len(pixels))
        latents = torch.zeros(len(pixels), 16, 12, 16)
        return latents, latents

    cache_latents(plain, encode, "vae", tmp_path / "cache")
    masked = Dataset(subsets=(read(pictures, tmp_path / "masks"),))
    cache = cache_latents(masked, encode, "vae", tmp_path / "cache")
    assert encoded == [1, 1]
    assert torch.equal(cache.load_mask(cache.entries[0].masks[0]), left_half())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("missing", r"The picture .*cat\.jpg has no mask in .*masks\. Put one there"),
        ("another size", r"The mask .*cat\.png has 64x96 pixels and its picture 128x96\. Make"),
        ("no picture", r"The picture .*cat\.png is damaged, cut off or not a picture"),
    ],
)
def test_a_wrong_mask_is_named_or_its_picture_left_out(
    pictures: Path, tmp_path: Path, wrong: str, words: str
) -> None:
    mask = tmp_path / "masks" / "cat.png"
    mask.unlink()
    if wrong == "another size":
        Image.new("L", (64, 96)).save(mask)
    if wrong == "no picture":
        mask.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=words):
        read(pictures, tmp_path / "masks")
    subset = read(pictures, tmp_path / "masks", on_bad_file="skip")
    assert [Path(record.path).name for record in subset.records] == ["dog.png"]
    (told,) = (warning for warning in subset.warnings if warning.startswith("Left out: "))
    assert "cat" in told


def test_when_no_picture_has_a_mask_nothing_is_left(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no mask in"):
        read(pictures, tmp_path / "empty", on_bad_file="skip")


def test_two_masks_of_one_name_are_refused(pictures: Path, tmp_path: Path) -> None:
    Image.new("L", SIZE).save(tmp_path / "masks" / "cat.bmp")
    with pytest.raises(
        ValueError, match=r"Two pictures have one name: .*cat\.bmp and .*cat\.png\."
    ):
        read(pictures, tmp_path / "masks", on_bad_file="skip")


def test_a_missing_folder_of_masks_is_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder .*nowhere does not exist"):
        read(pictures, tmp_path / "nowhere")


def test_a_mask_that_changed_is_noticed(pictures: Path, tmp_path: Path) -> None:
    subset = read(pictures, tmp_path / "masks")
    Image.new("L", SIZE, 9).save(tmp_path / "masks" / "cat.png")
    with pytest.raises(ValueError, match=r"cat\.png changed after the dataset was read"):
        cached_weights(subset, tmp_path / "cache")
