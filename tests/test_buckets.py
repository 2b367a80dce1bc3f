"""Sizes of pictures. Expected values come from arithmetic, not from the pack."""

import hashlib
import math
import random

import pytest
from atelier.trainers.buckets import (
    MODES,
    Resolution,
    bucket_sizes,
    is_enlarged,
    limited_size,
    nearest_bucket,
)

SETTINGS = [  # width, height, step
    (512, 768, 16),
    (1024, 1024, 64),
    (64, 64, 16),
    (64, 512, 64),
    (1008, 1024, 16),
]


def pictures(seed: int, count: int = 300) -> list[tuple[int, int]]:
    """Sizes of pictures, small ones as likely as large ones."""
    draw = random.Random(seed)
    side = lambda: round(math.exp(draw.uniform(0, math.log(9000))))  # noqa: E731
    return [(side(), side()) for _ in range(count)]


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
    with pytest.raises(ValueError, match="fixed, buckets, square, preserved, random, got 'any'"):
        Resolution(mode="any")  # type: ignore[arg-type]


def test_a_step_without_a_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 16 or 64 pixels, got 32"):
        Resolution(step=32)


def test_a_side_off_a_step_of_64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be a multiple of 64 .* got 528"):
        Resolution(width=528, step=64)


def test_the_buckets_of_512x768_stay_those_of_the_first_version() -> None:
    expected = (
        (448, 880),
        (464, 848),
        (480, 816),
        (496, 800),
        (512, 768),
        (528, 752),
        (544, 720),
        (560, 704),
        (576, 688),
        (592, 672),
        (608, 640),
        (624, 624),
        (640, 608),
        (656, 592),
        (672, 592),
        (688, 576),
        (704, 560),
        (720, 544),
        (736, 528),
        (752, 528),
        (768, 512),
        (784, 496),
        (800, 496),
        (816, 480),
        (832, 480),
        (848, 464),
        (864, 448),
        (880, 448),
    )
    assert bucket_sizes(512, 768) == expected


def test_a_step_of_64_gives_the_buckets_that_arithmetic_gives() -> None:
    # 1024 x 1024 = 256 squares of 64; columns from sqrt(256 / 2) = 11.3 to sqrt(256 * 2) = 22.6
    rows = {12: 21, 13: 20, 14: 18, 15: 17, 16: 16, 17: 15, 18: 14, 19: 13, 20: 13, 21: 12, 22: 12}
    expected = tuple((64 * columns, 64 * count) for columns, count in rows.items())
    assert bucket_sizes(1024, 1024, step=64) == expected


@pytest.mark.parametrize("max_aspect", [1, 2, 10, 1000])
@pytest.mark.parametrize(("width", "height", "step"), SETTINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("upscale", [True, False])
def test_every_side_is_one_or_more_steps(
    mode: str, width: int, height: int, step: int, max_aspect: float, upscale: bool
) -> None:
    resolution = Resolution(
        width=width, height=height, step=step, mode=mode, max_aspect=max_aspect, upscale=upscale
    )
    sides = [side for size in pictures(0) for side in resolution.size_for(*size, str(size))]
    assert min(sides) >= step
    assert {side % step for side in sides} == {0}


@pytest.mark.parametrize(("width", "height", "step"), SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_every_area_is_the_asked_one_up_to_rounded_sides(
    mode: str, width: int, height: int, step: int
) -> None:
    resolution = Resolution(width=width, height=height, step=step, mode=mode)
    for size in pictures(1):
        sides = resolution.size_for(*size, str(size))
        assert abs(math.prod(sides) - width * height) <= step / 2 * (sum(sides) + step / 2)


def test_square_gives_the_side_of_the_area() -> None:
    # sqrt(512 * 768) = 627.07, whose nearest multiple of 16 is 624
    resolution = Resolution(width=512, height=768, mode="square")
    assert {resolution.size_for(*size) for size in pictures(2)} == {(624, 624)}


@pytest.mark.parametrize(("width", "height", "step"), SETTINGS)
def test_preserved_keeps_the_shape_up_to_rounded_sides(width: int, height: int, step: int) -> None:
    resolution = Resolution(width=width, height=height, step=step, mode="preserved")
    limit = max(2.0, width / height, height / width)
    for picture in pictures(3):
        aspect = min(max(picture[0] / picture[1], 1 / limit), limit)
        exact_height = math.sqrt(width * height / aspect)
        got = resolution.size_for(*picture)
        assert abs(got[0] - aspect * exact_height) <= step / 2 + 1e-6
        assert abs(got[1] - exact_height) <= step / 2 + 1e-6


def test_preserved_crops_less_than_buckets() -> None:
    # 16:9 at 512 x 768: sqrt(393216 * 16 / 9) = 836.1 and sqrt(393216 * 9 / 16) = 470.3
    assert Resolution(mode="preserved").size_for(1920, 1080) == (832, 464)


def test_random_sizes_are_drawn_from_the_buckets_by_the_seed_alone() -> None:
    resolution = Resolution(mode="random")
    drawn = [resolution.size_for(100 + n, 100, f"{n:x}") for n in range(1000)]
    assert set(drawn) == set(bucket_sizes(512, 768))
    assert drawn == [resolution.size_for(7, 7 + n, f"{n:x}") for n in range(1000)]


def test_random_sizes_are_the_same_in_every_process() -> None:
    digest = hashlib.sha256(b"size 5e39").hexdigest()
    sizes = bucket_sizes(512, 768)
    expected = sizes[int(digest[:16], 16) % len(sizes)]
    assert Resolution(mode="random").size_for(9, 9, "5e39") == expected


@pytest.mark.parametrize(("width", "height", "step"), SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_without_upscale_only_pictures_too_small_for_the_shape_are_enlarged(
    mode: str, width: int, height: int, step: int
) -> None:
    options = {"width": width, "height": height, "step": step, "mode": mode}
    for picture in pictures(4, 1000):
        full = Resolution(**options).size_for(*picture, str(picture))
        size = Resolution(**options, upscale=False).size_for(*picture, str(picture))
        # The shorter side at which the whole shape fits into the picture, without rounding.
        fitting = min(picture[0] * min(full) / full[0], picture[1] * min(full) / full[1])
        if fitting >= min(full):
            assert size == full
        elif fitting >= 64 + 1e-6:
            assert not is_enlarged(picture, size)
        else:
            assert min(size) == min(64, min(full))


@pytest.mark.parametrize(("width", "height", "step"), SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_a_size_that_shrinks_keeps_its_shape_and_is_as_large_as_it_can_be(
    mode: str, width: int, height: int, step: int
) -> None:
    options = {"width": width, "height": height, "step": step, "mode": mode}
    for picture in pictures(5, 1000):
        full = Resolution(**options).size_for(*picture, str(picture))
        size = Resolution(**options, upscale=False).size_for(*picture, str(picture))
        if size == full or min(size) == 64:
            continue
        factor = min(picture[0] / full[0], picture[1] / full[1])
        for side, full_side in zip(size, full, strict=True):
            assert side <= full_side * factor + 1e-6 < side + step + 1e-3
        assert picture[0] - size[0] < step or picture[1] - size[1] < step


@pytest.mark.parametrize(
    ("mode", "picture", "expected"),
    [
        ("fixed", (512, 768), (512, 768)),
        ("fixed", (511, 768), (496, 752)),  # 768 * 511 / 512 = 766.5
        ("fixed", (4000, 384), (256, 384)),
        ("fixed", (30, 30), (64, 96)),  # enlarged: 30 is less than 64
        ("square", (400, 500), (400, 400)),
        ("preserved", (400, 300), (384, 288)),  # of 720x544: 720 * 300 / 544 = 397.1
    ],
)
def test_sizes_without_upscale(
    mode: str, picture: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert Resolution(mode=mode, upscale=False).size_for(*picture) == expected


@pytest.mark.parametrize(
    ("picture", "size", "expected"),
    [
        ((64, 64), (64, 64), False),
        ((63, 999), (64, 64), True),
        ((999, 63), (64, 64), True),
        ((65, 999), (64, 64), False),
    ],
)
def test_a_picture_is_enlarged_when_one_side_is_shorter(
    picture: tuple[int, int], size: tuple[int, int], expected: bool
) -> None:
    assert is_enlarged(picture, size) is expected


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((4000, 3000), 0, (4000, 3000)),
        ((4000, 3000), 4000, (4000, 3000)),
        ((4000, 3000), 1000, (1000, 750)),
        ((3000, 4000), 1000, (750, 1000)),
        ((30000, 1), 1000, (1000, 1)),
    ],
)
def test_a_limited_size_keeps_its_shape(
    size: tuple[int, int], max_side: int, expected: tuple[int, int]
) -> None:
    assert limited_size(size, max_side) == expected
