"""Sizes and pixels. Expected values come from arithmetic, NumPy and Pillow, not from the pack."""

import io
import math

import numpy as np
import pytest
import torch
from atelier.trainers.buckets import Resolution, bucket_sizes, nearest_bucket, transform
from PIL import Image

ROTATE_90_CLOCKWISE = 6  # EXIF: the first stored row is the right side of the picture


def test_fixed_mode_gives_every_picture_the_same_size() -> None:
    resolution = Resolution(width=512, height=768)
    assert {resolution.size_for(*size) for size in [(10, 9), (4000, 3000)]} == {(512, 768)}


@pytest.mark.parametrize(("width", "height"), [(512, 768), (1024, 1024), (128, 128), (1536, 512)])
def test_buckets_keep_the_area_within_half_a_step_of_height(width: int, height: int) -> None:
    for bucket_width, bucket_height in bucket_sizes(width, height):
        assert abs(bucket_width * bucket_height - width * height) <= bucket_width * 8


def test_bucket_sides_are_multiples_of_16() -> None:
    assert {side % 16 for size in bucket_sizes(512, 768) for side in size} == {0}


def test_the_asked_size_is_a_bucket_even_beyond_the_aspect_limit() -> None:
    assert (1536, 512) in bucket_sizes(1536, 512)


def test_buckets_reach_the_aspect_limit_and_stop_there() -> None:
    aspects = [max(w / h, h / w) for w, h in bucket_sizes(1024, 1024)]
    assert 1.9 < max(aspects) < 2.05


@pytest.mark.parametrize("size", [(3000, 2000), (1000, 1000), (900, 1600), (5000, 1000), (1, 1)])
def test_the_nearest_bucket_distorts_the_aspect_least(size: tuple[int, int]) -> None:
    sizes = bucket_sizes(512, 768)
    width, height = nearest_bucket(*size, sizes)
    distances = [abs(math.log(w / h * size[1] / size[0])) for w, h in sizes]
    assert abs(math.log(width / height * size[1] / size[0])) == pytest.approx(min(distances))


@pytest.mark.parametrize("side", [0, 48, 500, 513, 8208, -512])
def test_a_side_off_the_grid_is_refused(side: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 16 between 64 and 8192 pixels, got {side}"):
        Resolution(width=side)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'fixed' or 'buckets', got 'square'"):
        Resolution(mode="square")  # type: ignore[arg-type]


def test_pixels_are_the_bytes_mapped_to_minus_one_to_one() -> None:
    grid = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    pixels = transform(Image.fromarray(grid), 80, 64)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.permute(1, 2, 0), grid / 255 * 2 - 1, atol=1e-6)


def test_a_wide_picture_is_cropped_at_its_centre() -> None:
    stripes = np.zeros((64, 192, 3), dtype=np.uint8)
    stripes[:, :64, 0], stripes[:, 64:128, 1], stripes[:, 128:, 2] = 255, 255, 255
    pixels = transform(Image.fromarray(stripes), 64, 64)
    assert torch.equal(pixels, torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 64, 64))


def test_resizing_is_lanczos() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    expected = Image.fromarray(noise).resize((64, 64), Image.Resampling.LANCZOS)
    pixels = transform(Image.fromarray(noise), 64, 64)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), np.asarray(expected) / 127.5 - 1, atol=1e-6)


def test_a_small_picture_is_enlarged_to_the_size() -> None:
    assert transform(Image.new("RGB", (7, 5)), 128, 64).shape == (3, 64, 128)


def test_the_exif_rotation_is_applied() -> None:
    upright = np.zeros((80, 64, 3), dtype=np.uint8)
    upright[:40] = 255  # white above, black below
    stored = Image.fromarray(np.rot90(upright))  # turned counter-clockwise, as a camera stores it
    exif = Image.Exif()
    exif[0x0112] = ROTATE_90_CLOCKWISE
    file = io.BytesIO()
    stored.save(file, "png", exif=exif)
    pixels = transform(Image.open(file), 64, 80)
    np.testing.assert_allclose(pixels.permute(1, 2, 0), upright / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_becomes_white(mode: str) -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0)).convert(mode)
    assert transform(clear, 64, 64).min() == 1


def test_half_transparent_black_over_white_is_grey() -> None:
    pixels = transform(Image.new("RGBA", (64, 64), (0, 0, 0, 51)), 64, 64)
    assert pixels.mean().item() == pytest.approx(0.8 * 2 - 1, abs=1e-2)


def test_a_transparent_palette_colour_becomes_white() -> None:
    palette = Image.new("P", (64, 64), 3)
    palette.info["transparency"] = 3
    assert transform(palette, 64, 64).min() == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_keeps_its_range(dtype: type) -> None:
    ramp = np.linspace(0, 65535, 64).astype(dtype)
    pixels = transform(Image.fromarray(np.tile(ramp, (64, 1))), 64, 64)
    np.testing.assert_allclose(pixels[0, 0], ramp / 65535 * 2 - 1, atol=1 / 250)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 200, (200, 200, 200)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("1", 1, (255,) * 3)],
)
def test_other_colour_modes_become_rgb(mode: str, colour: object, expected: tuple) -> None:
    pixels = transform(Image.new(mode, (64, 64), colour), 64, 64)
    np.testing.assert_allclose(pixels[:, 0, 0], np.array(expected) / 127.5 - 1, atol=1e-6)
