"""The pictures of a dataset on one sheet, as they are trained: crops, masks, sizes, captions.

Subsets come one after the other, the sizes of each in order; a line spans the pictures of a size.
Sizes and places are in pixels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from .buckets import Size, is_enlarged
from .checks import require
from .dataset import Dataset, Record, Subset, open_mask, open_picture
from .fonts import Face, drawable
from .marked_pictures import SHADE, TINT, hatching, marked_picture
from .progress import OnProgress

COLUMNS = 6
CELL, GAP, MARGIN = 240, 16, 32
WIDTH = 2 * MARGIN + COLUMNS * CELL + (COLUMNS - 1) * GAP
_TITLE, _SUBSET, _BAND, _FOOT = 88, 68, 34, 24
_PAD, _LINE, _PILL = 10, 19, 24
_CAPTION_LINES = 7

_PAPER, _CARD, _MAT, _RULE = "#f4f5f7", "#ffffff", "#e6e9ed", "#d5dae0"
_INK, _FAINT, _ACCENT, _GLOW = "#1f2730", "#77818d", "#2458a6", "#e3ecf9"
_WARM, _ALARM = "#f6ead9", "#a32d50"

_ENLARGED = "enlarged"
_TITLE_FACE, _HEADING, _TEXT, _SMALL = Face(28), Face(21), Face(14), Face(12)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One page."""

    image: Image.Image
    """RGB, `WIDTH` pixels wide."""
    unreadable: tuple[str, ...]
    """Of each picture or mask that could not be decoded, the sentence that says why."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One picture on the sheet."""

    subset: Subset
    record: Record
    size: Size
    group: int
    """How many pictures of the subset have this size."""

    @property
    def caption(self) -> str:
        return drawable(self.record.texts[0][0])

    @property
    def lines(self) -> list[tuple[int, int]]:
        """Start and end of each line of the caption."""
        return _TEXT.wrapped(self.caption, CELL - 2 * _PAD)[:_CAPTION_LINES]

    @property
    def pills(self) -> list[str]:
        """What is special, in a word each."""
        record, texts = self.record, self.record.texts
        found = [f"{record.repeats}x"] if record.repeats > 1 else []
        found += ["+ mirrored"] if self.subset.pictures.flip else []
        found += ["masked"] if record.mask else []
        if is_enlarged((record.width, record.height), self.size):
            found.append(_ENLARGED)
        found += [f"{len(texts)} captions"] if len(texts) > 1 else []
        orders = max(len(variants) for variants in texts)
        return found + ([f"{orders} orders"] if orders > 1 else [])

    @property
    def pill_rows(self) -> list[list[str]]:
        rows: list[list[str]] = [[]]
        for pill in self.pills:
            if sum(_pill_width(one) for one in [*rows[-1], pill]) > CELL - 2 * _PAD:
                rows.append([])
            rows[-1].append(pill)
        return [row for row in rows if row]

    @property
    def height(self) -> int:
        text = _LINE + len(self.pill_rows) * _PILL + max(1, len(self.lines)) * _LINE
        return CELL + 2 * _PAD + text


def num_pages(dataset: Dataset, pictures_per_page: int) -> int:
    """How many sheets show all of the dataset."""
    return -(-sum(len(subset.records) for subset in dataset.subsets) // pictures_per_page)


def contact_sheet(
    dataset: Dataset,
    *,
    page: int = 1,
    pictures_per_page: int = 64,
    on_progress: OnProgress | None = None,
) -> Sheet:
    """The sheet number `page`, from 1. Only its pictures are decoded.

    Raises:
        ValueError: there is no such page.
    """
    pages = num_pages(dataset, pictures_per_page)
    require(
        1 <= page <= pages,
        f"There is no page {page} of the contact sheet: the dataset fills {pages} of "
        f"{pictures_per_page} pictures.",
    )
    first = (page - 1) * pictures_per_page
    cells = list(itertools.islice(_cells(dataset), first, first + pictures_per_page))
    rows = list(_rows(cells))
    heights = [_row_height(row) + (_SUBSET if is_first else 0) for row, is_first in rows]
    sheet = Image.new("RGB", (WIDTH, _TITLE + sum(heights) + _FOOT), _PAPER)
    pen = ImageDraw.Draw(sheet)
    count = sum(len(subset.records) for subset in dataset.subsets)
    facts = [_counted(count, "picture"), f"{dataset.num_samples} seen per epoch"]
    facts += [f"page {page} of {pages}"] if pages > 1 else []
    _draw_title(sheet, pen, "  ·  ".join(facts))
    unreadable: list[str] = []
    top, done = _TITLE, 0
    for (row, is_first), height in zip(rows, heights, strict=True):
        if is_first:
            _draw_subset(pen, top, row[0].subset)
        row_top = top + height - _row_height(row)
        _draw_bands(pen, row_top, row)
        for column, cell in enumerate(row):
            place = (_left(column), row_top + _BAND)
            unreadable += _draw_cell(sheet, pen, place, cell, _row_height(row) - _BAND - GAP)
            done += 1
            if on_progress:
                on_progress(done, len(cells))
        top += height
    return Sheet(image=sheet, unreadable=tuple(unreadable))


def _cells(dataset: Dataset) -> Iterator[_Cell]:
    for subset in dataset.subsets:
        groups: dict[Size, list[Record]] = {}
        for record in subset.records:
            groups.setdefault(subset.size_of(record), []).append(record)
        for size, records in sorted(groups.items()):
            for record in records:
                yield _Cell(subset=subset, record=record, size=size, group=len(records))


def _rows(cells: Sequence[_Cell]) -> Iterator[tuple[list[_Cell], bool]]:
    """Cells of one subset beside each other, and whether they are its first on the sheet."""
    for _, some in itertools.groupby(cells, key=lambda cell: id(cell.subset)):
        members = list(some)
        for start in range(0, len(members), COLUMNS):
            yield members[start : start + COLUMNS], start == 0


def _row_height(row: Sequence[_Cell]) -> int:
    return _BAND + max(cell.height for cell in row) + GAP


def _left(column: int) -> int:
    return MARGIN + column * (CELL + GAP)


def _draw_title(sheet: Image.Image, pen: ImageDraw.ImageDraw, facts: str) -> None:
    end = _TITLE_FACE.draw(pen, MARGIN, 56, "Dataset", _INK)
    _TEXT.draw(pen, end + 18, 56, facts, _FAINT)
    labels = ("cut off by the crop", "masked, does not count", "trigger word")
    left = WIDTH - MARGIN - sum(_TEXT.length(label) + 50 for label in labels) + 18
    for number, label in enumerate(labels):
        box = (round(left), 43, round(left) + 24, 59)
        if number == 1:
            pen.rectangle(box, fill=_CARD)
            size = (box[2] - box[0] + 1, box[3] - box[1] + 1)
            stripes = Image.fromarray((hatching(size) * 255).astype("uint8"))
            sheet.paste(TINT, box[:2], stripes)
        else:
            pen.rectangle(box, fill=_GLOW if number else SHADE)
        left = _TEXT.draw(pen, left + 32, 56, label, _FAINT) + 18


def _draw_subset(pen: ImageDraw.ImageDraw, top: int, subset: Subset) -> None:
    pen.line((MARGIN, top, WIDTH - MARGIN, top), fill=_RULE)
    name = _HEADING.shortened(drawable(subset.name), WIDTH // 3)
    left = _HEADING.draw(pen, MARGIN, top + 38, name, _INK) + 16
    for label in _subset_facts(subset):
        left = _draw_pill(pen, left, top + 21, label, _WARM) + 6


def _subset_facts(subset: Subset) -> Iterator[str]:
    size, schedule = subset.resolution, subset.schedule
    yield _counted(len(subset.records), "picture")
    yield f"{size.width} x {size.height}, {size.mode}"
    if subset.pictures.crop != "center":
        yield f"crop {subset.pictures.crop}"
    if subset.is_regularization:
        yield "regularization"
    if subset.is_prior:
        yield "class pictures"
    if schedule.probability:
        yield f"probability {schedule.probability:.3g}"
    if schedule.start_step:
        yield f"from step {schedule.start_step} on"
    if subset.captions.dropout:
        yield f"{subset.captions.dropout:.0%} without a caption"


def _draw_bands(pen: ImageDraw.ImageDraw, top: int, row: Sequence[_Cell]) -> None:
    column = 0
    for size, some in itertools.groupby(row, key=lambda cell: cell.size):
        members = list(some)
        left, right = _left(column), _left(column + len(members) - 1) + CELL
        end = _TEXT.draw(pen, left, top + 16, f"{size[0]} x {size[1]}", _INK)
        label = _counted(members[0].group, "picture")
        _SMALL.draw(pen, end + 10, top + 16, label, _FAINT)
        pen.line((left, top + 25, right - 1, top + 25), fill=_ACCENT, width=2)
        column += len(members)


def _draw_cell(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int], cell: _Cell, height: int
) -> list[str]:
    """Returns what is wrong with the picture."""
    left, top = place
    pen.rectangle((left, top, left + CELL - 1, top + height - 1), fill=_CARD, outline=_RULE)
    pen.rectangle((left + 1, top + 1, left + CELL - 2, top + CELL - 1), fill=_MAT)
    record = cell.record
    (how, *_) = cell.subset.pictures.transforms(cell.size, record.content)
    problems = []
    try:
        mask = open_mask(record.mask) if record.mask else None
        marked = marked_picture(open_picture(record), mask, how, (CELL - 2, CELL - 2))
    except ValueError as error:
        problems.append(str(error))
        label = "cannot be read"
        middle = left + (CELL - _TEXT.length(label)) / 2
        _TEXT.draw(pen, middle, top + CELL // 2, label, _ALARM)
    else:
        spare = CELL - marked.width, CELL - marked.height
        sheet.paste(marked, (left + spare[0] // 2, top + spare[1] // 2))
    _draw_texts(pen, left + _PAD, top + CELL + _PAD, cell)
    return problems


def _draw_texts(pen: ImageDraw.ImageDraw, left: int, top: int, cell: _Cell) -> None:
    record, width = cell.record, CELL - 2 * _PAD
    pixels = f"{record.width} x {record.height}"
    room = width - _SMALL.length(pixels)
    name = _SMALL.shortened(drawable(Path(record.path).name), room - 10)
    _SMALL.draw(pen, left, top + 11, name, _FAINT)
    _SMALL.draw(pen, left + room, top + 11, pixels, _FAINT)
    top += _LINE
    for row in cell.pill_rows:
        end: float = left
        for pill in row:
            end = _draw_pill(pen, end, top, pill, _WARM if pill == _ENLARGED else _MAT) + 4
        top += _PILL
    caption, lines = cell.caption, cell.lines
    if not caption:
        _TEXT.draw(pen, left, top + 14, "no caption", _ALARM)
    for number, (start, end_of_line) in enumerate(lines):
        text = caption[start:end_of_line]
        if number == _CAPTION_LINES - 1 and end_of_line < len(caption):
            text = _TEXT.shortened(caption[start:], width)
        _draw_line(pen, left, top + 14 + number * _LINE, text, cell.subset.captions.trigger)


def _draw_line(
    pen: ImageDraw.ImageDraw, left: float, baseline: int, text: str, trigger: str
) -> None:
    """One line of a caption, with the trigger word marked."""
    mark = drawable(trigger)
    parts = re.split(f"({re.escape(mark)})", text) if mark else [text]
    for part in parts:
        if part == mark:
            right = left + _TEXT.length(part)
            pen.rounded_rectangle((left - 2, baseline - 13, right + 2, baseline + 4), 4, _GLOW)
        left = _TEXT.draw(pen, left, baseline, part, _ACCENT if part == mark else _INK)


def _draw_pill(pen: ImageDraw.ImageDraw, left: float, top: int, label: str, colour: str) -> float:
    right = left + _pill_width(label) - 4
    pen.rounded_rectangle((left, top, right, top + 19), 9, colour)
    _SMALL.draw(pen, left + 7, top + 14, label, _INK)
    return right


def _pill_width(label: str) -> float:
    return _SMALL.length(label) + 18


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
