"""Sheets of a grid: what lies where, by looking at pixels; numbers in a text; the table."""

import csv
import io
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from atelier.trainers.grid import MAX_SIDE, Axis, Place, parse_numbers, places, sheet, table
from PIL import Image

LONG = "a portrait of an old fisherman in the morning light, " * 30
PAPER, RULE = (0xF4, 0xF5, 0xF7), (0xD5, 0xDA, 0xE0)
CODE = np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
"""Makes a number of a colour."""

Box = tuple[int, int, int, int]


def axes(prompts: Sequence[str], *others: int) -> list[Axis]:
    """Prompts, and axes of so many values."""
    labels = ([f"value {number}" for number in range(count)] for count in others)
    return [Axis(labels=tuple(prompts), is_text=True), *(Axis(labels=tuple(one)) for one in labels)]


def colour(place: Place) -> tuple[int, int, int]:
    """Another one for each cell, and none of a letter."""
    red, green, blue = (*place, 0, 0)[:3]
    return 250 - 20 * red, 20 * green + 5, 250 - 60 * blue


def drawn(
    these: Sequence[Axis], size: tuple[int, int] = (256, 192), facts: str = "seed 0"
) -> tuple[np.ndarray, dict[Place, Box]]:
    """The pixels of a sheet of plain colours, and where each cell lies in it."""
    image = sheet("grid", facts, these, size, lambda place: Image.new("RGB", size, colour(place)))
    pixels = np.asarray(image)
    codes = pixels @ CODE
    boxes = {}
    for place in places(these):
        is_cell = codes == np.array(colour(place)) @ CODE
        columns, rows = np.flatnonzero(is_cell.any(axis=0)), np.flatnonzero(is_cell.any(axis=1))
        left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
        assert is_cell[top:bottom, left:right].all()  # nothing is drawn over it
        boxes[place] = (int(left), int(top), int(right), int(bottom))
    return pixels, boxes


def sizes(boxes: dict[Place, Box]) -> set[tuple[int, int]]:
    return {(right - left, bottom - top) for left, top, right, bottom in boxes.values()}


@pytest.mark.parametrize(
    ("these", "columns", "rows"),
    [
        (axes(["a cat", "a dog"], 3, 1), 3, 2),
        (axes(["a cat", "a dog"], 1, 2), 2, 2),
        (axes(["a cat", "a dog"], 3, 2), 3, 4),
        (axes(["a cat"], 2, 3), 2, 3),
        (axes(["a cat", "a dog", "a house"], 1, 1), 3, 1),
        (axes(["a cat"], 8, 1), 3, 3),  # a row of eight is broken
        (axes(["a cat"], 1, 1), 1, 1),
    ],
)
def test_what_varies_first_goes_across_and_the_rest_down(
    these: list[Axis], columns: int, rows: int
) -> None:
    _, boxes = drawn(these)
    assert len({box[0] for box in boxes.values()}) == columns
    assert len({box[1] for box in boxes.values()}) == rows
    assert len(sizes(boxes)) == 1
    read = sorted(boxes, key=lambda place: (boxes[place][1], boxes[place][0]))
    across = 1 if len(these[1].labels) > 1 else 2 if len(these[2].labels) > 1 else 0
    order = sorted(boxes, key=lambda p: ([v for n, v in enumerate(p) if n != across], p[across]))
    assert read == order


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        ((2, 2), (1024, 1024), (1024, 1024)),  # as they are
        ((2, 2), (128, 128), (256, 256)),  # enlarged, so that labels fit
        ((6, 8), (128, 64), (256, 128)),
    ],
)
def test_pictures_are_as_large_as_they_are_or_enlarged(
    count: tuple[int, int], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    _, boxes = drawn(axes(["a cat"] * count[0], count[1]), size)
    assert sizes(boxes) == {expected}


@pytest.mark.parametrize(
    ("count", "size"), [((6, 8), (1024, 1024)), ((6, 8), (768, 1344)), ((12, 3), (1344, 768))]
)
def test_many_large_pictures_fit_on_a_sheet(count: tuple[int, int], size: tuple[int, int]) -> None:
    pixels, boxes = drawn(axes([LONG] * count[0], count[1]), size)
    assert 0.7 * MAX_SIDE < max(pixels.shape) < 1.1 * MAX_SIDE
    ((width, height),) = sizes(boxes)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.02)


def test_long_prompts_stay_in_their_rows() -> None:
    """Between two rows there is nothing but a line."""
    pixels, boxes = drawn(axes([LONG, LONG, LONG], 2, 2), (256, 96))
    edges = sorted({(box[1], box[3]) for box in boxes.values()})
    assert len(edges) == 6
    for (_, bottom), (top, _) in itertools.pairwise(edges):
        between = pixels[bottom:top].reshape(-1, 3)
        assert {tuple(map(int, one)) for one in np.unique(between, axis=0)} <= {PAPER, RULE}


@pytest.mark.parametrize("facts", ["seed 0", LONG])
@pytest.mark.parametrize("prompt", ["a cat", "猫、窓辺、水彩画。" * 60, LONG])
def test_nothing_is_written_to_the_edge(prompt: str, facts: str) -> None:
    for these in (axes([prompt], 2), axes([prompt, prompt], 2), axes([prompt] * 3, 1)):
        pixels, _ = drawn(these, (128, 128), facts)
        for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
            assert (edge == PAPER).all()


def test_labels_of_columns_stand_above_them() -> None:
    pixels, boxes = drawn(axes(["a cat", "a dog"], 2))
    top = min(box[1] for box in boxes.values())
    is_ink = (pixels < 100).all(axis=2)
    for left, _, right, _ in boxes.values():
        assert is_ink[top - 40 : top, left:right].any()
    assert not is_ink[top - 40 : top, : min(box[0] for box in boxes.values()) - 1].any()


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1", (1.0,)),
        ("0.5, 1", (0.5, 1.0)),
        (" -1;0  1e-1,\n2, ", (-1.0, 0.0, 0.1, 2.0)),
    ],
)
def test_numbers_of_a_text(text: str, numbers: tuple[float, ...]) -> None:
    assert parse_numbers(text, "strengths", -10, 10) == numbers


@pytest.mark.parametrize("text", ["", " , ", "one", "1 x 2", "11", "-11", "nan", "inf", "1..2"])
def test_what_is_no_list_of_numbers_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"^strengths must be numbers from -10 to 10 with commas"):
        parse_numbers(text, "strengths", -10, 10)


def test_the_table_is_csv_whatever_the_prompts_hold() -> None:
    rows = [
        {"prompt": 'a "red" apple, cut', "strength": 0.5, "file": "a.png"},
        {"prompt": "窓辺の猫", "strength": 1.0, "file": "b.png"},
    ]
    read = list(csv.DictReader(io.StringIO(table(rows))))
    assert read == [{name: str(value) for name, value in row.items()} for row in rows]
