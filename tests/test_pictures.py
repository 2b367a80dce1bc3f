"""Pixels of pictures. Expected values come from arithmetic, NumPy and Pillow, not from the pack."""

import hashlib
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from atelier.trainers.buckets import limited_size
from atelier.trainers.caches import digest
from atelier.trainers.pictures import (
    CROPS,
    Transform,
    crop_box,
    decode,
    display_size,
    has_unusable_profile,
    transform,
    transform_mask,
)
from PIL import Image, ImageCms, ImageOps

ROTATE_90_CLOCKWISE = 6  # EXIF: the first stored row is the right side of the picture

KEY_OF_VERSION_1 = "5e39298137a441bd38e5fb88979d45f9e66cdaf4f5637c218648c7f0e8012543"
"""SHA-256 of ["content", {"height": 768, "version": 1, "width": 512}, "vae"] as JSON."""


def pixels_of(image: Image.Image, width: int = 64, height: int = 64, **options: Any) -> np.ndarray:
    """[height, width, 3] in 0..255, as floats."""
    pixels = transform(image, Transform(width=width, height=height, **options))
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, height, width)
    return (pixels.permute(1, 2, 0).numpy() + 1) * 127.5


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(grid)


def saved(image: Image.Image, kind: str = "png", **options: Any) -> Image.Image:
    """The picture after a way through a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return decode(file.getvalue(), "picture")


def rotated_by_exif(upright: np.ndarray) -> Image.Image:
    """Stored turned counter-clockwise, as a camera does, with the EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = ROTATE_90_CLOCKWISE
    return saved(Image.fromarray(np.rot90(upright)), exif=exif)


def picture_sizes(seed: int, count: int) -> list[tuple[int, int]]:
    draw = random.Random(seed)
    return [(draw.randint(1, 400), draw.randint(1, 400)) for _ in range(count)]


# Keys


def test_the_key_of_a_plain_transform_is_that_of_the_first_version() -> None:
    facts = Transform(width=512, height=768, version=1).facts()
    assert digest(["content", facts, "vae"]) == KEY_OF_VERSION_1


def test_the_version_is_always_part_of_the_key() -> None:
    assert Transform(width=512, height=768).facts() == {"width": 512, "height": 768, "version": 2}


@pytest.mark.parametrize(
    "setting",
    [
        {"crop": "top"},
        {"crop": "random", "seed": "ab"},
        {"filter": "bicubic"},
        {"max_side": 2048},
        {"flip": True},
    ],
)
def test_every_setting_that_is_no_default_is_part_of_the_key(setting: dict[str, Any]) -> None:
    plain = {"width": 64, "height": 64, "version": 2}
    assert Transform(width=64, height=64, **setting).facts() == plain | setting


# Crop and resize


def test_pixels_are_the_bytes_mapped_to_minus_one_to_one() -> None:
    image = noise(80, 64)
    pixels = transform(image, Transform(width=80, height=64))
    np.testing.assert_allclose(pixels.permute(1, 2, 0), np.asarray(image) / 255 * 2 - 1, atol=1e-6)


def test_a_plain_transform_is_pillows_fit() -> None:
    draw = random.Random(1)
    for index, (width, height) in enumerate(picture_sizes(1, 60)):
        size = draw.choice([(64, 64), (96, 64), (64, 112)])
        image = noise(width, height, index)
        expected = ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)
        np.testing.assert_allclose(pixels_of(image, *size), np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "resampling"),
    [("lanczos", Image.Resampling.LANCZOS), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_the_filter_is_pillows(name: str, resampling: Image.Resampling) -> None:
    image = noise(256, 256)
    expected = np.asarray(image.resize((64, 64), resampling))
    np.testing.assert_allclose(pixels_of(image, filter=name), expected, atol=1e-4)


def test_a_small_picture_is_enlarged_to_the_size() -> None:
    assert pixels_of(Image.new("RGB", (7, 5)), 128, 64).shape == (64, 128, 3)


ACROSS = {"left": 0, "right": 2}
DOWN = {"top": 0, "bottom": 2}


@pytest.mark.parametrize("crop", [crop for crop in CROPS if crop != "random"])
def test_a_crop_keeps_its_side_or_corner(crop: str) -> None:
    words = crop.split()
    across = next((ACROSS[word] for word in words if word in ACROSS), 1)
    down = next((DOWN[word] for word in words if word in DOWN), 1)
    thirds = np.repeat(np.array([10, 100, 200], dtype=np.uint8), 64)
    wide = Image.fromarray(np.tile(thirds, (64, 1)))
    tall = Image.fromarray(np.tile(thirds[:, None], (1, 64)))
    assert np.allclose(pixels_of(wide, crop=crop), [10, 100, 200][across], atol=1e-4)
    assert np.allclose(pixels_of(tall, crop=crop), [10, 100, 200][down], atol=1e-4)


def test_random_crops_come_from_the_seed_and_reach_everywhere() -> None:
    boxes = [
        crop_box((192, 64), Transform(width=64, height=64, crop="random", seed=f"{n:x}"))
        for n in range(500)
    ]
    lefts = np.array([box[0] for box in boxes])
    counts, _ = np.histogram(lefts, bins=4, range=(0, 128))
    assert counts.min() > 90  # 125 each, plus or minus 10
    assert lefts.min() < 2
    assert lefts.max() > 126


def test_random_crops_are_the_same_in_every_process() -> None:
    drawn = hashlib.sha256(b"crop 5e39").hexdigest()
    left = 128 * int(drawn[:8], 16) / (2**32 - 1)
    top = 36 * int(drawn[8:16], 16) / (2**32 - 1)
    how = Transform(width=64, height=64, crop="random", seed="5e39")
    assert crop_box((192, 64), how) == pytest.approx((left, 0, left + 64, 64))
    assert crop_box((64, 100), how) == pytest.approx((0, top, 64, top + 64))


def test_a_long_picture_is_first_shrunk_by_the_same_filter() -> None:
    image = noise(300, 200)
    shrunk = image.resize((100, 67), Image.Resampling.BICUBIC)
    expected = ImageOps.fit(shrunk, (64, 64), method=Image.Resampling.BICUBIC)
    pixels = pixels_of(image, filter="bicubic", max_side=100)
    np.testing.assert_allclose(pixels, np.asarray(expected), atol=1e-4)


@pytest.mark.parametrize("max_side", [0, 300])
def test_a_picture_within_the_limit_is_not_shrunk_first(max_side: int) -> None:
    image = noise(300, 200)
    assert np.array_equal(pixels_of(image, max_side=max_side), pixels_of(image))


def test_a_flip_is_pillows_mirror_of_the_pixels() -> None:
    image = noise(100, 64)
    plain = Image.fromarray(pixels_of(image, crop="left").round().astype(np.uint8))
    expected = np.asarray(ImageOps.mirror(plain))
    np.testing.assert_allclose(pixels_of(image, crop="left", flip=True), expected, atol=1e-4)


def test_a_flipped_picture_flipped_is_itself() -> None:
    for index, size in enumerate(picture_sizes(2, 20)):
        image = noise(*size, index)
        flipped_twice = pixels_of(ImageOps.mirror(image), flip=True)
        np.testing.assert_allclose(flipped_twice, pixels_of(image), atol=1 + 1e-3)


def random_transforms(seed: int, count: int) -> list[tuple[tuple[int, int], Transform]]:
    draw = random.Random(seed)
    made = []
    for size in picture_sizes(seed, count):
        crop = draw.choice(CROPS)
        how = Transform(
            width=draw.choice([64, 96]),
            height=draw.choice([64, 80]),
            crop=crop,
            filter=draw.choice(["lanczos", "bicubic"]),
            max_side=draw.choice([0, 64, 200]),
            flip=draw.choice([True, False]),
            seed=f"{draw.random()}" if crop == "random" else "",
        )
        made.append((size, how))
    return made


def test_a_crop_lies_in_the_picture_has_the_shape_and_touches_two_sides() -> None:
    for size, how in random_transforms(3, 2000):
        left, top, right, bottom = crop_box(size, how)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        # max_side rounds a side to whole pixels, and that much the shape may be off.
        small = limited_size(size, how.max_side)
        wide, high = (right - left) * small[0] / size[0], (bottom - top) * small[1] / size[1]
        assert wide / high == pytest.approx(how.width / how.height)
        assert right - left == pytest.approx(size[0]) or bottom - top == pytest.approx(size[1])


def gradient(width: int, height: int) -> Image.Image:
    """Red is the place across, green the place down, from 0 to 255."""
    across = np.tile((np.arange(width) + 0.5) / width * 255, (height, 1))
    down = np.tile(((np.arange(height) + 0.5) / height * 255)[:, None], (1, width))
    grid = np.stack([across, down, np.zeros_like(across)], axis=-1)
    return Image.fromarray(grid.round().astype(np.uint8))


def test_the_crop_box_is_where_the_pixels_come_from() -> None:
    num_compared = 0
    for size, how in random_transforms(4, 150):
        pixels = (transform(gradient(*size), how).numpy() + 1) * 127.5
        if how.flip:
            pixels = pixels[:, :, ::-1]
        left, top, right, bottom = crop_box(size, how)
        small = limited_size(size, how.max_side)
        for values, first, last, length, small_length in (
            (pixels[0].mean(0), left, right, size[0], small[0]),
            (pixels[1].mean(1), top, bottom, size[1], small[1]),
        ):
            middles = first + (np.arange(len(values)) + 0.5) * (last - first) / len(values)
            # At the ends of the picture the filter, 3 pixels wide, bends the gradient.
            margin = 4 * max(length / small_length, (last - first) / len(values))
            inner = (middles > margin) & (middles < length - margin)
            assert (abs(values - middles / length * 255)[inner] < 2).all()
            num_compared += inner.sum()
    assert num_compared > 10000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"crop": "face"}, r"crop must be one of center, top, .*, random, got 'face'"),
        ({"filter": "nearest"}, r"filter must be one of lanczos, bicubic, got 'nearest'"),
        ({"max_side": 63}, r"max_side must be 0 \(off\) or at least 64 pixels, got 63"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transform(width=64, height=64, **setting)


# Kinds of pictures


def test_the_exif_rotation_is_applied() -> None:
    upright = np.zeros((80, 64, 3), dtype=np.uint8)
    upright[:40] = 255  # white above, black below
    stored = rotated_by_exif(upright)
    assert display_size(stored) == (64, 80)
    np.testing.assert_allclose(pixels_of(stored, 64, 80), upright, atol=1e-4)


def test_a_crop_is_taken_from_the_upright_picture() -> None:
    upright = np.zeros((192, 64, 3), dtype=np.uint8)
    upright[:64] = 255
    assert pixels_of(rotated_by_exif(upright), crop="top").min() == 255


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_becomes_white(mode: str) -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0)).convert(mode)
    assert pixels_of(clear).min() == 255


def test_half_transparent_black_over_white_is_grey() -> None:
    pixels = pixels_of(Image.new("RGBA", (64, 64), (0, 0, 0, 51)))
    assert pixels.mean() == pytest.approx(0.8 * 255, abs=1)


def test_a_transparent_palette_colour_becomes_white() -> None:
    palette = Image.new("P", (64, 64), 3)
    palette.info["transparency"] = 3
    assert pixels_of(palette).min() == 255


def test_a_palette_with_an_alpha_for_each_colour_lies_over_white() -> None:
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 200, 100, 0])
    image = saved(palette, transparency=bytes([255, 102]))  # 40 % of the second colour
    expected = np.array([200, 100, 0]) * 0.4 + 255 * 0.6
    np.testing.assert_allclose(pixels_of(image)[0, 0], expected, atol=1)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_16_bit_grey_keeps_its_range(dtype: type) -> None:
    ramp = np.linspace(0, 65535, 64).astype(dtype)
    pixels = pixels_of(Image.fromarray(np.tile(ramp, (64, 1))))
    np.testing.assert_allclose(pixels[0, :, 0], ramp / 257, atol=0.51)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [("L", 200, (200, 200, 200)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("1", 1, (255,) * 3)],
)
def test_other_colour_modes_become_rgb(mode: str, colour: object, expected: tuple) -> None:
    image = Image.new(mode, (64, 64), colour)  # type: ignore[arg-type]
    np.testing.assert_allclose(pixels_of(image)[0, 0], expected, atol=1e-4)


def test_a_cmyk_jpeg_has_the_colours_that_it_prints() -> None:
    image = saved(Image.new("CMYK", (64, 64), (255, 0, 0, 0)), "jpeg", quality=95)
    np.testing.assert_allclose(pixels_of(image)[0, 0], (0, 255, 255), atol=3)


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("blue", "red", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    image = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(image, "n_frames", 1) == 3
    np.testing.assert_allclose(pixels_of(image)[5, 5], (0, 0, 255), atol=1e-4)


def test_more_pixels_than_pillow_allows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("1", (100, 100)).save(file, "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4999)  # Pillow refuses twice as many
    with pytest.raises(ValueError, match=r"bomb\.png has too many pixels"):
        decode(file.getvalue(), "bomb.png")


# Colour profiles. They are made from Pillow's sRGB by changing its tags in place.

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

# Columns are the XYZ of red, green and blue, adapted to D50 (ICC's own sRGB, Apple's Display P3).
SRGB_TO_XYZ = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
P3_TO_XYZ = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)


def tag_places(profile: bytes) -> dict[bytes, int]:
    """Where the data of each tag begins."""
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * n) for n in range(count))
    return {name: place for name, place, _ in entries}


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged."""
    return SRGB.replace(b"rXYZ", b"?XYZ").replace(b"bXYZ", b"rXYZ").replace(b"?XYZ", b"bXYZ")


def p3_profile() -> bytes:
    profile = bytearray(SRGB)
    for column, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ")):
        values = [round(value * 65536) for value in P3_TO_XYZ[:, column]]
        struct.pack_into(">3i", profile, tag_places(SRGB)[name] + 8, *values)
    return bytes(profile)


def grey_profile() -> bytes:
    """Grey whose amount of light is the value to the power of 1.75."""
    profile = bytearray(SRGB.replace(b"rTRC", b"kTRC"))
    profile[16:20] = b"GRAY"
    place = tag_places(SRGB)[b"rTRC"]
    # A curve of one point is an exponent in 256ths.
    profile[place : place + 14] = b"curv" + bytes(4) + struct.pack(">IH", 1, 7 * 64)
    return bytes(profile)


def cmyk_profile() -> bytes:
    """A print whose lightness is 100 %, 50 % with full cyan, and 0 with any other full ink."""
    ramp = bytes(range(256))
    lightness = {(0, 0, 0, 0): 255, (1, 0, 0, 0): 128}
    corners = np.ndindex(2, 2, 2, 2)
    grid = b"".join(bytes([lightness.get(corner, 0), 128, 128]) for corner in corners)
    matrix = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + grid + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)  # D50
    head = bytearray(SRGB[:128])
    head[12:24] = b"prtrCMYKLab "
    tags = [(b"A2B0", lut + bytes(-len(lut) % 4)), (b"wtpt", white)]
    table, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags:
        table += struct.pack(">4sII", name, place + len(data), len(content))
        data += content
    struct.pack_into(">I", head, 0, place + len(data))
    return bytes(head) + table + data


def srgb_to_light(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 0..1."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def light_to_srgb(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_profile_with_red_and_blue_exchanged_exchanges_them(kind: str) -> None:
    options = {"lossless": True} if kind == "webp" else {}
    image = saved(Image.new("RGB", (64, 64), (220, 30, 90)), kind, **options)
    profiled = saved(image, kind, icc_profile=swapped_profile(), **options)
    expected = pixels_of(image)[..., ::-1]
    np.testing.assert_allclose(pixels_of(profiled), expected, atol=4 if kind == "jpeg" else 1.01)


def test_display_p3_becomes_srgb() -> None:
    image = noise(64, 64)
    light = srgb_to_light(np.asarray(image) / 255)
    expected = light_to_srgb(light @ P3_TO_XYZ.T @ np.linalg.inv(SRGB_TO_XYZ).T) * 255
    pixels = pixels_of(saved(image, icc_profile=p3_profile()))
    np.testing.assert_allclose(pixels, expected, atol=2)
    assert abs(pixels - np.asarray(image)).max() > 30


def test_an_srgb_profile_changes_nothing_to_see() -> None:
    image = noise(64, 64)
    pixels = pixels_of(saved(image, icc_profile=SRGB))
    np.testing.assert_allclose(pixels, np.asarray(image), atol=1.01)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_stays_with_a_profile(mode: str) -> None:
    image = Image.new("RGBA", (64, 64), (220, 30, 90, 102))
    image.paste((0, 0, 0, 0), (0, 0, 64, 32))
    if mode == "P":
        image = image.quantize(method=Image.Quantize.FASTOCTREE)
    pixels = pixels_of(saved(image, icc_profile=swapped_profile()))
    assert pixels[:30].min() == 255
    expected = np.array([90, 30, 220]) * 0.4 + 255 * 0.6
    np.testing.assert_allclose(pixels[40, 5], expected, atol=2)


def test_a_rotated_picture_keeps_its_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = ROTATE_90_CLOCKWISE
    image = saved(Image.new("RGB", (64, 64), "red"), exif=exif, icc_profile=swapped_profile())
    np.testing.assert_allclose(pixels_of(image)[0, 0], (0, 0, 255), atol=1.01)


@pytest.mark.parametrize("kind", ["L", "LA", "I;16"])
def test_a_grey_profile_becomes_srgb(kind: str) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint16) * 4, (64, 1))
    image = Image.fromarray(ramp.astype(np.uint8))
    image = Image.fromarray(ramp * 257) if kind == "I;16" else image.convert(kind)
    pixels = pixels_of(saved(image, icc_profile=grey_profile()))
    expected = light_to_srgb((ramp / 255) ** 1.75)[..., None].repeat(3, axis=-1) * 255
    np.testing.assert_allclose(pixels, expected, atol=2)


@pytest.mark.parametrize(
    ("inks", "expected"),
    [
        ((0, 0, 0, 0), 255),
        ((255, 0, 0, 0), 119),  # CIE lightness 50: light 0.1842, sRGB 118.9
        ((0, 0, 0, 255), 0),
    ],
)
def test_a_cmyk_profile_becomes_srgb(inks: tuple[int, ...], expected: int) -> None:
    image = Image.new("CMYK", (64, 64), inks)
    image = saved(image, "jpeg", quality=100, icc_profile=cmyk_profile())
    assert not has_unusable_profile(image)
    np.testing.assert_allclose(pixels_of(image)[0, 0], (expected,) * 3, atol=3)


UNUSABLE = [
    ("RGB", b"no profile"),
    ("RGB", SRGB[:200]),
    ("RGB", grey_profile()),
    ("RGB", cmyk_profile()),
    ("CMYK", SRGB),
    ("L", cmyk_profile()),
]


@pytest.mark.parametrize(("mode", "profile"), UNUSABLE)
def test_a_profile_that_cannot_be_used_is_told_and_means_srgb(mode: str, profile: bytes) -> None:
    colour = {"RGB": (220, 30, 90), "CMYK": (255, 0, 0, 0), "L": 77}[mode]
    plain = saved(Image.new(mode, (64, 64), colour), "jpeg")
    image = saved(Image.new(mode, (64, 64), colour), "jpeg", icc_profile=profile)
    assert has_unusable_profile(image)
    assert np.array_equal(pixels_of(image), pixels_of(plain))


def test_a_profile_that_cannot_be_unpacked_is_told() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "png", icc_profile=SRGB)
    data = bytearray(file.getvalue())
    start = data.index(b"iCCP")
    length = struct.unpack_from(">I", data, start - 4)[0]
    data[start + 4 + len(b"ICC Profile\0\0")] = 0xFF  # the head of the compressed profile
    struct.pack_into(">I", data, start + 4 + length, zlib.crc32(data[start : start + 4 + length]))
    image = decode(bytes(data), "picture")
    assert has_unusable_profile(image)
    assert pixels_of(image)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("profile", [None, SRGB, p3_profile()])
def test_a_picture_without_or_with_a_good_profile_has_nothing_to_tell(
    profile: bytes | None,
) -> None:
    image = saved(Image.new("RGB", (64, 64)), icc_profile=profile)
    assert not has_unusable_profile(image)


# Masks


def mask_of(mask: Image.Image, width: int = 64, height: int = 64, **options: Any) -> np.ndarray:
    """[height, width] in 0..1."""
    weights = transform_mask(mask, Transform(width=width, height=height, **options))
    assert weights.dtype == torch.float32
    assert weights.shape == (1, height, width)
    return weights[0].numpy()


def test_a_mask_has_the_geometry_of_the_pixels() -> None:
    for size, how in random_transforms(5, 150):
        if min(size) < 64:
            continue
        across, down, _ = gradient(*size).split()
        pixels = (transform(gradient(*size), how).numpy() + 1) / 2
        inner = (slice(8, -8), slice(8, -8))
        # Enlarging repeats pixels: up to half of a source pixel away.
        near = 0.012 + 0.5 / min(size)
        assert abs(transform_mask(across, how).numpy()[0] - pixels[0])[inner].max() < near
        assert abs(transform_mask(down, how).numpy()[0] - pixels[1])[inner].max() < near


def test_a_shrunk_mask_is_the_mean_of_its_pixels() -> None:
    grid = np.random.default_rng(0).integers(0, 256, (128, 256), dtype=np.uint8)
    expected = grid[:, 64:192].reshape(64, 2, 64, 2).mean((1, 3)) / 255
    np.testing.assert_allclose(mask_of(Image.fromarray(grid)), expected, atol=1e-6)


def test_an_enlarged_mask_has_no_weights_of_its_own() -> None:
    checks = (np.indices((16, 16)).sum(0) % 2).astype(np.uint8) * 255
    expected = checks.repeat(4, 0).repeat(4, 1) / 255
    assert np.array_equal(mask_of(Image.fromarray(checks)), expected)


def test_a_mask_of_another_size_covers_the_same_part() -> None:
    large = np.zeros((192, 384), dtype=np.uint8)
    large[:, 192:] = 255
    small = Image.fromarray(large).resize((96, 48), Image.Resampling.NEAREST)
    for crop in ("left", "center", "right"):
        expected = mask_of(Image.fromarray(large), crop=crop)
        assert np.array_equal(mask_of(small, crop=crop), expected)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, 1.0),
        ("L", 51, 0.2),
        ("I;16", 13107, 0.2),
        ("RGB", (51, 51, 51), 0.2),
        ("RGBA", (255, 255, 255, 0), 0.0),
        ("RGBA", (255, 255, 255, 51), 0.2),
        ("LA", (255, 51), 0.2),
    ],
)
def test_mask_colours_are_weights(mode: str, colour: Any, expected: float) -> None:
    weights = mask_of(Image.new(mode, (64, 64), colour))
    np.testing.assert_allclose(weights, expected, atol=1e-3)


def test_a_colour_profile_does_not_change_a_mask() -> None:
    mask = saved(Image.new("L", (64, 64), 51), icc_profile=grey_profile())
    np.testing.assert_allclose(mask_of(mask), 0.2, atol=1e-6)


def test_the_alpha_of_a_rotated_picture_is_turned_with_it() -> None:
    upright = np.full((80, 64, 4), 255, dtype=np.uint8)
    upright[40:, :, 3] = 0
    alpha = rotated_by_exif(upright).getchannel("A")
    assert np.array_equal(mask_of(alpha, 64, 80), upright[..., 3] / 255)
