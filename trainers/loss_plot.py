"""The curve of a training's loss as a picture, drawn with PIL alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from PIL import Image, ImageDraw

from .checks import require
from .fonts import Face, drawable

Point = tuple[float, float]

MIN_SIZE = (384, 256)
"""Smallest width and height in pixels at which axes and labels have room."""
_DRAWN_AT = (960, 540)
"""The width and height in pixels for which the distances below are; larger pictures enlarge
them."""
_SCALE = 2
"""Drawn at twice the size and halved, which smooths the lines."""
_LEFT, _TOP, _TITLE, _RIGHT, _BOTTOM = 78, 58, 36, 36, 58
_INK, _FAINT, _RULE, _RAW, _SMOOTH = "#1b1b1b", "#666666", "#e4e4e4", "#a9bdd8", "#1d4f91"
_MANTISSAS = (tuple(range(1, 10)), (1, 2, 5), (1, 3), (1,))
_MOST_TICKS = 10


def loss_plot(
    losses: Sequence[float],
    *,
    smoothing: float,
    log_scale: bool = False,
    size: tuple[int, int] = _DRAWN_AT,
    title: str = "",
) -> Image.Image:
    """The loss of every step faintly, and on top of it the loss smoothed by `smoothed`.

    `size` is (width, height) in pixels. Losses that are no numbers are left out, and on a
    logarithmic scale those that are not above 0.

    Raises:
        ValueError: no loss is left to draw, or the size or the smoothing is out of its range.
    """
    require(
        size[0] >= MIN_SIZE[0] and size[1] >= MIN_SIZE[1],
        f"A loss plot needs {MIN_SIZE[0]}x{MIN_SIZE[1]} pixels or more, got {size[0]}x{size[1]}.",
    )
    raw = [
        (step, float(loss))
        for step, loss in enumerate(losses, start=1)
        if math.isfinite(loss) and (loss > 0 or not log_scale)
    ]
    if not raw and log_scale:
        raise ValueError(
            f"None of the {len(losses)} losses is a number above 0, which a logarithmic scale "
            "needs. Turn log_scale off."
        )
    require(
        bool(raw), f"None of the {len(losses)} losses is a number, so there is nothing to plot."
    )
    low, high = min(loss for _, loss in raw), max(loss for _, loss in raw)
    y_ticks = log_ticks(low, high) if log_scale else ticks(low, high)
    axes = _Axes(size, ticks(0, len(losses), whole=True), y_ticks, log_scale, bool(title))
    axes.draw_grid()
    legend = [("each step", _RAW if smoothing else _SMOOTH)]
    axes.line(raw, legend[0][1], 1.5)
    if smoothing:
        means = smoothed([loss for _, loss in raw], smoothing)
        axes.line([(step, mean) for (step, _), mean in zip(raw, means, strict=True)], _SMOOTH, 3)
        legend.append((f"smoothed {smoothing:.3g}", _SMOOTH))
    axes.write_head(drawable(title), legend)
    return axes.picture()


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """The exponential moving average, in which each value weighs `smoothing` times the next one.

    It is divided by the sum of the weights, so its start is not drawn towards 0 (the bias
    correction of Adam, https://arxiv.org/abs/1412.6980, section 3).

    Raises:
        ValueError: the smoothing is not at least 0 and below 1.
    """
    require(0 <= smoothing < 1, f"The smoothing must be at least 0 and below 1, got {smoothing}.")
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = smoothing * total + value, smoothing * weight + 1
        means.append(total / weight)
    return means


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Four to nine round numbers at equal distances, from at most `low` to at least `high`.

    `whole` numbers may be fewer.
    """
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(part * power for part in (0.2, 0.25, 0.5, 1, 2) if span <= 6 * part * power)
    if whole:
        step = max(1, math.ceil(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most ten round numbers for a logarithmic axis, from at most `low` to at least `high`.

    Both are above 0. Where the numbers are close together, the ticks are those of a linear axis.
    """
    if high < 2 * low:
        return ticks(low, high)
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high)) + 1
    for mantissas in _MANTISSAS:
        candidates = [part * 10.0**power for power in range(first, last) for part in mantissas]
        found = _around([*candidates, 10.0**last], low, high)
        if len(found) <= _MOST_TICKS:
            return found
    decades = -(-(last - first) // (_MOST_TICKS - 1))
    return [10.0**power for power in range(first, last + decades, decades)]


def _around(numbers: list[float], low: float, high: float) -> list[float]:
    """From the last number that is not above `low` to the first that is not below `high`."""
    start = max(i for i, number in enumerate(numbers) if number <= low * (1 + 1e-9))
    end = min(i for i, number in enumerate(numbers) if number >= high * (1 - 1e-9))
    return numbers[start : end + 1]


class _Axes:
    """A picture with two axes; data are drawn in their numbers, the rest in pixels."""

    def __init__(
        self,
        size: tuple[int, int],
        x_ticks: list[float],
        y_ticks: list[float],
        log_scale: bool,
        has_title: bool,
    ) -> None:
        self._size = size
        self._unit = max(0.8, min(size[0] / _DRAWN_AT[0], size[1] / _DRAWN_AT[1]))
        top = _TOP + (_TITLE if has_title else 0)
        self._left, self._right = _LEFT * self._unit, size[0] - _RIGHT * self._unit
        self._top, self._bottom = top * self._unit, size[1] - _BOTTOM * self._unit
        self._image = Image.new("RGB", (_SCALE * size[0], _SCALE * size[1]), "white")
        self._pen = ImageDraw.Draw(self._image)
        self._x_ticks, self._y_ticks = x_ticks, y_ticks
        self._log_scale = log_scale

    def picture(self) -> Image.Image:
        return self._image.resize(self._size, Image.Resampling.LANCZOS)

    def draw_grid(self) -> None:
        unit, bottom = self._unit, self._bottom
        free_up_to = math.inf
        for value in self._y_ticks:
            y, label = self._y(value), f"{value:.6g}"
            self._segments([(self._left, y), (self._right, y)], _RULE, 1)
            if y <= free_up_to:
                width = self._width(label, 15)
                self._text(self._left - 10 * unit - width, y + 5 * unit, label, _FAINT, 15)
                free_up_to = y - 17 * unit
        free_from = 0.0
        for value in self._x_ticks:
            x, label = self._x(value), f"{value:.6g}"
            width = self._width(label, 15)
            self._segments([(x, bottom), (x, bottom + 5 * unit)], _FAINT, 1)
            if x - width / 2 >= free_from:
                self._text(x - width / 2, bottom + 22 * unit, label, _FAINT, 15)
                free_from = x + width / 2 + 12 * unit
        self._segments([(self._left, bottom), (self._right, bottom)], _FAINT, 1)
        width = self._width("step", 15)
        self._text(self._right - width, self._size[1] - 10 * unit, "step", _FAINT, 15)

    def line(self, points: Sequence[Point], colour: str, width: float) -> None:
        """Through points in the numbers of the axes; a single one is a dot."""
        places = list(_thinned([(self._x(x), self._y(y)) for x, y in points]))
        if len(places) > 1:
            self._segments(places, colour, width)
            return
        x, y = (_SCALE * place for place in places[0])
        radius = 1.5 * _SCALE * width * self._unit
        self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def write_head(self, title: str, legend: list[tuple[str, str]]) -> None:
        if title:
            face = Face(21 * self._unit)
            shown = face.shortened(title, self._right - self._left)
            self._text(self._left, 40 * self._unit, shown, _INK, 21)
        x = self._left - 10 * self._unit - self._width("loss", 15)
        baseline = self._top - 22 * self._unit
        self._text(x, baseline, "loss", _FAINT, 15)
        x = self._left
        for label, colour in legend:
            self._text(x, baseline, label, colour, 15)
            x += self._width(label, 15) + 24 * self._unit

    def _text(self, x: float, baseline: float, text: str, colour: str, size: float) -> None:
        face = Face(_SCALE * size * self._unit)
        face.draw(self._pen, _SCALE * x, _SCALE * baseline, text, colour)

    def _width(self, text: str, size: float) -> float:
        return Face(_SCALE * size * self._unit).length(text) / _SCALE

    def _segments(self, points: Sequence[Point], colour: str, width: float) -> None:
        scaled = [(_SCALE * x, _SCALE * y) for x, y in points]
        pixels = max(1, round(_SCALE * width * self._unit))
        self._pen.line(scaled, colour, pixels, joint="curve")

    def _x(self, value: float) -> float:
        first, last = self._x_ticks[0], self._x_ticks[-1]
        return self._left + (value - first) / (last - first) * (self._right - self._left)

    def _y(self, value: float) -> float:
        scale = math.log if self._log_scale else float
        first, last = scale(self._y_ticks[0]), scale(self._y_ticks[-1])
        return self._bottom - (scale(value) - first) / (last - first) * (self._bottom - self._top)


def _thinned(points: Sequence[Point]) -> Iterator[Point]:
    """Of each column of pixels the highest and the lowest point: more would not be seen."""
    for _, column in itertools.groupby(points, key=lambda point: round(point[0])):
        places = list(column)
        ends = {min(places, key=_height), max(places, key=_height)}
        yield from sorted(ends)


def _height(point: Point) -> float:
    return point[1]
