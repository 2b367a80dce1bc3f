"""Contact sheets: what is drawn where, by looking at pixels; and text in any script."""

from pathlib import Path

import numpy as np
import pytest
from atelier.trainers import fonts
from atelier.trainers.buckets import Resolution
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.contact_sheet import (
    CELL,
    COLUMNS,
    GAP,
    MARGIN,
    WIDTH,
    contact_sheet,
    num_pages,
)
from atelier.trainers.dataset import Dataset
from atelier.trainers.fonts import Face, drawable, font_of
from atelier.trainers.image_folder import image_folder
from atelier.trainers.marked_pictures import OUTLINE, marked_picture
from atelier.trainers.pictures import Crop, Transform
from PIL import Image, ImageFont

GREY = (120, 130, 140)
MOVED = {"center": 0.5, "left": 0.0, "right": 1.0}


def marked(size: tuple[int, int], how: Transform, mask: Image.Image | None = None) -> np.ndarray:
    picture = Image.new("RGB", size, GREY)
    return np.asarray(marked_picture(picture, mask, how, (200, 200)), dtype=int)


def add_pictures(folder: Path, count: int, size: tuple[int, int] = (64, 64)) -> Path:
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", size, (10 * index, 99, 99)).save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(f"caption {index}", encoding="utf-8")
    return folder


def dataset(*folders: Path, **options: object) -> Dataset:
    resolution = Resolution(width=64, height=64)
    subsets = (image_folder(path, resolution=resolution, **options) for path in folders)
    return Dataset(subsets=tuple(subsets))


@pytest.mark.parametrize("crop", MOVED)
def test_the_outline_lies_around_the_crop_and_the_rest_is_dark(crop: Crop) -> None:
    """Of 800 x 400 a square is 400 wide; at a quarter of the size it is 100, of 200."""
    pixels = marked((800, 400), Transform(width=64, height=64, crop=crop))
    assert pixels.shape == (100, 200, 3)
    left = round(MOVED[crop] * 100)
    is_outline = (pixels == OUTLINE).all(axis=2)
    columns = np.flatnonzero(is_outline.all(axis=0))
    assert [columns.min(), columns.max()] == [left, left + 99]
    inside = pixels[4:-4, left + 4 : left + 96]
    assert (inside == GREY).all()
    outside = np.delete(pixels, np.s_[left : left + 100], axis=1)
    assert outside.max() < 80


def test_a_picture_of_the_right_shape_is_not_darkened() -> None:
    pixels = marked((300, 300), Transform(width=64, height=64))
    assert (pixels[4:-4, 4:-4] == GREY).all()


def test_what_the_mask_leaves_out_is_hatched() -> None:
    mask = Image.new("L", (300, 300), 255)
    mask.paste(0, (0, 0, 150, 300))
    pixels = marked((300, 300), Transform(width=64, height=64), mask)
    assert (pixels[4:-4, 104:-4] == GREY).all()
    shades = np.unique(pixels[4:-4, 4:96].reshape(-1, 3), axis=0)
    assert len(shades) == 2
    assert (shades != GREY).any(axis=1).all()


def test_a_rotated_picture_is_shown_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (400, 200), GREY)
    picture.getexif().update(exif)
    shown = marked_picture(picture, None, Transform(width=64, height=64), (200, 200))
    assert shown.size == (100, 200)


def test_the_sheet_has_a_row_for_every_six_pictures(tmp_path: Path) -> None:
    heights = [
        contact_sheet(dataset(add_pictures(tmp_path / str(count), count))).image.size
        for count in (1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 1)
    ]
    assert {width for width, _ in heights} == {WIDTH}
    one, full, two, three = (height for _, height in heights)
    assert one == full
    assert three - two == two - full > CELL


def test_a_picture_lies_in_its_place_on_the_sheet(tmp_path: Path) -> None:
    sheet = contact_sheet(dataset(add_pictures(tmp_path / "a", COLUMNS))).image
    middle = next(
        y for y in range(sheet.height) if sheet.getpixel((MARGIN + CELL // 2, y)) == (0, 99, 99)
    )
    colours = [
        sheet.getpixel((MARGIN + column * (CELL + GAP) + CELL // 2, middle + 40))
        for column in range(COLUMNS)
    ]
    assert colours == [(10 * index, 99, 99) for index in range(COLUMNS)]


def test_pages_show_the_pictures_in_turn_and_decode_no_others(tmp_path: Path) -> None:
    folder = add_pictures(tmp_path / "a", 5)
    data = dataset(folder)
    (folder / "004.png").write_bytes((folder / "004.png").read_bytes()[:60])
    assert num_pages(data, 2) == 3
    assert [contact_sheet(data, page=n, pictures_per_page=2).unreadable for n in (1, 2)] == [()] * 2
    (problem,) = contact_sheet(data, page=3, pictures_per_page=2).unreadable
    assert "004.png" in problem
    with pytest.raises(ValueError, match="no page 4 of the contact sheet: the dataset fills 3"):
        contact_sheet(data, page=4, pictures_per_page=2)


def test_the_progress_counts_pictures_and_can_stop(tmp_path: Path) -> None:
    data = dataset(add_pictures(tmp_path / "a", 3))
    seen: list[tuple[int, int]] = []
    contact_sheet(data, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_trigger_word_is_marked(tmp_path: Path) -> None:
    folder = add_pictures(tmp_path / "a", 1)
    plain = contact_sheet(dataset(folder, captions=CaptionSettings(prefix="sks,"))).image
    marked = contact_sheet(dataset(folder, captions=CaptionSettings(trigger="sks"))).image
    assert plain.size == marked.size
    assert np.asarray(plain).tolist() != np.asarray(marked).tolist()


def test_a_character_without_a_font_is_written_as_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_SYSTEM_FONTS", ())
    for remembered in (fonts.font_of, fonts._installed):
        remembered.cache_clear()
    try:
        assert drawable("a 猫\n b\x00") == "a \\u732b b\\x00"
        assert font_of("猫") is None
    finally:
        for remembered in (fonts.font_of, fonts._installed):
            remembered.cache_clear()


def test_lines_fit_and_nothing_of_the_text_is_lost() -> None:
    """Widths are measured by Pillow itself."""
    face, font = Face(14), ImageFont.load_default(14)
    text = f"a picture of a house, {'x' * 90} and more words to fill another line"
    lines = [text[start:end] for start, end in face.wrapped(text, 120)]
    assert "".join(lines) == text
    assert max(font.getlength(line.rstrip()) for line in lines) <= 120
    assert len(lines) < 15


def test_a_text_without_spaces_is_broken_after_any_sign() -> None:
    face = Face(14)
    text = "一只猫坐在窗边" * 6
    lines = face.wrapped(text, 100)
    assert len(lines) > 2
    assert "".join(text[start:end] for start, end in lines) == text
    assert all(face.length(text[start:end]) <= 100 for start, end in lines)


def test_a_long_line_is_shortened_with_an_ellipsis() -> None:
    face = Face(14)
    assert face.shortened("short", 200) == "short"
    shortened = face.shortened("a rather long line of text", 80)
    assert shortened.endswith("…")
    assert 50 < face.length(shortened) <= 80
