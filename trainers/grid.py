"""Pictures of a few settings against each other: what is compared, on one sheet, and as a table.

Sizes and places are in pixels.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .checks import require
from .fonts import Face, drawable

Place = tuple[int, ...]
"""Of a cell: its number on each axis."""

MAX_SIDE = 4096
"""Of a sheet, whose pictures are made smaller until it fits."""
MIN_CELL, SMALL_CELL = 96, 240
"""Pictures are not made smaller than the first, and small ones enlarged to about the second."""
_MAX_IN_A_ROW = 6
"""Cells of one row that are not broken into several."""

_PAPER, _RULE = "#f4f5f7", "#d5dae0"
_INK, _FAINT, _ACCENT = "#1f2730", "#77818d", "#2458a6"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One thing that is compared."""

    labels: tuple[str, ...]
    """Of each value; a single one is a fact that all pictures share."""
    is_text: bool = False
    """Whether its labels are long, as prompts are: they stand beside rows, not above columns."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    title: str
    """What stands beside the first row of several; empty for the others."""
    labels: tuple[str, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Columns with one label each, and the rows below it."""

    headers: tuple[str, ...]
    rows: tuple[_Row, ...]


@dataclass(frozen=True, kw_only=True)
class _Measures:
    """How large everything on a sheet is."""

    cell: tuple[int, int]
    text: int
    side: int
    """Width of the column with the labels of rows; 0 without it."""
    columns: int

    @property
    def gap(self) -> int:
        return max(8, self.cell[0] // 40)

    @property
    def margin(self) -> int:
        return 2 * self.text

    @property
    def line(self) -> int:
        return round(1.35 * self.text)

    @property
    def inner_width(self) -> int:
        return self.side + self.columns * (self.cell[0] + self.gap) - self.gap

    @property
    def width(self) -> int:
        return 2 * self.margin + self.inner_width

    def left(self, column: int) -> int:
        return self.margin + self.side + column * (self.cell[0] + self.gap)


def parse_numbers(text: str, name: str, low: float, high: float) -> tuple[float, ...]:
    """The numbers of a text such as '0.5, 1'.

    Raises:
        ValueError: there are none, or one is no number from `low` to `high`; `name` is the input.
    """
    words = re.split(r"[,;\s]+", text.strip(" ,;\n"))
    try:
        numbers = tuple(float(word) for word in words)
    except ValueError:
        numbers = ()
    require(
        bool(numbers) and all(low <= number <= high for number in numbers),
        f"{name} must be numbers from {low:g} to {high:g} with commas between them, such as "
        f"'0.5, 1', got {text!r}.",
    )
    return numbers


def table(cells: Iterable[Mapping[str, object]]) -> str:
    """The cells as CSV, one in each line, with the names of their values above."""
    rows = list(cells)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def places(axes: Sequence[Axis]) -> list[Place]:
    """All cells, those of the last axis beside each other."""
    return list(itertools.product(*(range(len(axis.labels)) for axis in axes)))


def sheet(
    title: str,
    facts: str,
    axes: Sequence[Axis],
    size: tuple[int, int],
    picture: Callable[[Place], Image.Image],
) -> Image.Image:
    """All cells with their labels, RGB, hardly larger than `MAX_SIDE` on each side.

    Columns are the first axis that varies and has short labels; the others are rows.

    Args:
        facts: what all cells share, in short.
        size: width and height of every picture.
        picture: opens that of a cell, when it is drawn.
    """
    blocks = _blocks(axes)
    measures = _measures(blocks, size)
    heading = _Heading(title, facts, axes, measures)
    heights = [_header_height(block, measures) + _rows_height(block, measures) for block in blocks]
    height = heading.height + sum(heights) + measures.margin - measures.gap
    image = Image.new("RGB", (measures.width, height), _PAPER)
    pen = ImageDraw.Draw(image)
    heading.draw(pen)
    top = heading.height
    for block, block_height in zip(blocks, heights, strict=True):
        _draw_headers(pen, top, block, measures)
        row_top = top + _header_height(block, measures)
        for row in block.rows:
            _draw_row(image, pen, row_top, row, measures, picture)
            row_top += measures.cell[1] + measures.gap
        top += block_height
    return image


def _blocks(axes: Sequence[Axis]) -> list[_Block]:
    varied = [number for number, axis in enumerate(axes) if len(axis.labels) > 1]
    across = next((n for n in varied if not axes[n].is_text), varied[0] if varied else 0)
    down = [number for number in varied if number != across]
    headers = axes[across].labels if varied else ("",)

    def place(column: int, chosen: dict[int, int]) -> Place:
        return tuple(column if n == across else chosen.get(n, 0) for n in range(len(axes)))

    rows = []
    for values in itertools.product(*(range(len(axes[number].labels)) for number in down)):
        chosen = dict(zip(down, values, strict=True))
        titles = [axes[n].labels[v] for n, v in chosen.items() if axes[n].is_text]
        is_first = not any(v for n, v in chosen.items() if not axes[n].is_text)
        labels = [axes[n].labels[v] for n, v in chosen.items() if not axes[n].is_text]
        rows.append(
            _Row(
                title=" ".join(titles) if is_first else "",
                labels=tuple(labels),
                places=tuple(place(column, chosen) for column in range(len(headers))),
            )
        )
    if len(rows) > 1 or len(headers) <= _MAX_IN_A_ROW:
        return [_Block(headers=headers, rows=tuple(rows))]
    # One row of many is broken into several of about a square together.
    length = math.ceil(math.sqrt(len(headers)))
    return [
        _Block(
            headers=headers[start : start + length],
            rows=(_Row(title="", labels=(), places=rows[0].places[start : start + length]),),
        )
        for start in range(0, len(headers), length)
    ]


def _measures(blocks: Sequence[_Block], size: tuple[int, int]) -> _Measures:
    columns = max(len(block.headers) for block in blocks)
    num_rows = sum(len(block.rows) for block in blocks)
    has_side = any(row.title or row.labels for block in blocks for row in block.rows)
    share = 0.92 * MAX_SIDE  # the rest is for labels
    scale = min(share / (columns + 0.6 * has_side) / size[0], share / num_rows / size[1], 1.0)
    scale = max(scale, MIN_CELL / max(size))
    if max(size) < SMALL_CELL:
        scale = math.ceil(SMALL_CELL / max(size))
    width, height = (max(1, round(side * scale)) for side in size)
    # Between a share of the cell and one of the sheet: it is read in whole, and in parts.
    text = max(14, round(math.sqrt(0.06 * width * 0.01 * width * (columns + 0.6))))
    side = max(12 * text, width // 2) if has_side else 0
    return _Measures(cell=(width, height), text=text, side=side, columns=columns)


class _Heading:
    """The lines above all cells: a title, what they share, and a prompt that they share."""

    def __init__(self, title: str, facts: str, axes: Sequence[Axis], measures: _Measures) -> None:
        self._measures = measures
        self._face, self._text = Face(1.8 * measures.text), Face(measures.text)
        width = measures.inner_width
        self._title = self._face.shortened(drawable(title), width)
        single = [axis for axis in axes if len(axis.labels) == 1]
        shared = [axis.labels[0] for axis in single if not axis.is_text]
        self._facts = _lines(self._text, "  ·  ".join([*shared, facts]), width, 3)
        texts = " ".join(axis.labels[0] for axis in single if axis.is_text)
        self._texts = _lines(self._text, texts, width, 3)

    @property
    def height(self) -> int:
        measures = self._measures
        lines = len(self._facts) + len(self._texts)
        return round(1.5 * measures.margin + 1.6 * measures.text) + lines * measures.line

    def draw(self, pen: ImageDraw.ImageDraw) -> None:
        left = self._measures.margin
        baseline = left + round(1.2 * self._measures.text)
        self._face.draw(pen, left, baseline, self._title, _INK)
        baseline += round(0.3 * self._measures.text)
        for lines, colour in ((self._texts, _INK), (self._facts, _FAINT)):
            for line in lines:
                baseline += self._measures.line
                self._text.draw(pen, left, baseline, line, colour)


def _header_lines(block: _Block, measures: _Measures) -> list[list[str]]:
    face = Face(measures.text)
    return [_lines(face, header, measures.cell[0], 3) for header in block.headers]


def _header_height(block: _Block, measures: _Measures) -> int:
    most = max(len(lines) for lines in _header_lines(block, measures))
    return most * measures.line + measures.text // 2


def _rows_height(block: _Block, measures: _Measures) -> int:
    return len(block.rows) * (measures.cell[1] + measures.gap) + measures.gap


def _draw_headers(pen: ImageDraw.ImageDraw, top: int, block: _Block, measures: _Measures) -> None:
    bottom = top + _header_height(block, measures) - measures.text // 2
    for column, lines in enumerate(_header_lines(block, measures)):
        for number, line in enumerate(reversed(lines)):
            baseline = bottom - number * measures.line - measures.text // 4
            Face(measures.text).draw(pen, measures.left(column), baseline, line, _INK)


def _draw_row(
    image: Image.Image,
    pen: ImageDraw.ImageDraw,
    top: int,
    row: _Row,
    measures: _Measures,
    picture: Callable[[Place], Image.Image],
) -> None:
    face, left = Face(measures.text), measures.margin
    if row.title:
        rule = top - measures.gap // 2
        pen.line((left, rule, measures.width - left, rule), _RULE, max(1, measures.text // 14))
    width = measures.side - measures.text
    room = max(1, measures.cell[1] // measures.line - len(row.labels))
    lines = [(line, _INK) for line in _lines(face, row.title, width, room)]
    lines += [(line, _ACCENT) for label in row.labels for line in _lines(face, label, width, 1)]
    for number, (line, colour) in enumerate(lines):
        face.draw(pen, left, top + measures.text + number * measures.line, line, colour)
    for column, place in enumerate(row.places):
        drawn = picture(place).convert("RGB").resize(measures.cell, Image.Resampling.LANCZOS)
        image.paste(drawn, (measures.left(column), top))


def _lines(face: Face, text: str, width: float, most: int) -> list[str]:
    """The text in at most so many lines, with an ellipsis if that is not all."""
    whole = drawable(text)
    spans = face.wrapped(whole, width)
    if len(spans) <= most:
        return [whole[start:end].rstrip() for start, end in spans]
    kept = [whole[start:end].rstrip() for start, end in spans[: most - 1]]
    return [*kept, face.shortened(whole[spans[most - 1][0] :], width)]
