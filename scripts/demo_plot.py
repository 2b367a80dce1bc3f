"""The demo's curve of the training loss, drawn with PIL alone."""

import math

from PIL import Image, ImageDraw, ImageFont

SIZE_PX = (960, 540)
SCALE = 2
"""Drawn at twice the size and halved, which smooths the lines."""
LEFT_PX, TOP_PX, RIGHT_PX, BOTTOM_PX = 78, 92, 36, 58
INK, FAINT, RULE, RAW, SMOOTH = "#1b1b1b", "#666666", "#e4e4e4", "#a9bdd8", "#1d4f91"


def loss_plot(losses: list[float], *, title: str) -> Image.Image:
    """The loss of every step, and its running mean."""
    axes = Axes(ticks(0, len(losses)), ticks(min(losses), max(losses)))
    axes.draw_grid()
    axes.line(losses, RAW, 1.5)
    axes.line(running_mean(losses), SMOOTH, 3)
    axes.text(LEFT_PX, 22, title, INK, 21)
    axes.text(LEFT_PX, 56, "each step", RAW, 15)
    axes.text(LEFT_PX + 90, 56, "running mean", SMOOTH, 15)
    return axes.image.resize(SIZE_PX, Image.Resampling.LANCZOS)


def running_mean(values: list[float]) -> list[float]:
    """An exponential mean over about a twentieth of the values, unbiased at its start."""
    decay = 1 - 1 / max(1, len(values) / 20)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers at equal distances, from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span))
    step = next(part * power for part in (0.2, 0.25, 0.5, 1, 2) if span <= 6 * part * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


class Axes:
    """A picture with two axes; data are drawn in their numbers, the rest in pixels."""

    def __init__(self, x_ticks: list[float], y_ticks: list[float]) -> None:
        self.image = Image.new("RGB", tuple(SCALE * side for side in SIZE_PX), "white")
        self._pen = ImageDraw.Draw(self.image)
        self._x_ticks, self._y_ticks = x_ticks, y_ticks

    def draw_grid(self) -> None:
        right, bottom = SIZE_PX[0] - RIGHT_PX, SIZE_PX[1] - BOTTOM_PX
        for value in self._y_ticks:
            y = self._y(value)
            self._segments([(LEFT_PX, y), (right, y)], RULE, 1)
            self.text(LEFT_PX - 10, y, f"{value:.6g}", FAINT, 15, "rm")
        for value in self._x_ticks:
            x = self._x(value)
            self._segments([(x, bottom), (x, bottom + 5)], FAINT, 1)
            self.text(x, bottom + 10, f"{value:.6g}", FAINT, 15, "ma")
        self._segments([(LEFT_PX, bottom), (right, bottom)], FAINT, 1)
        self.text(right, SIZE_PX[1] - 8, "step", FAINT, 15, "rs")
        self.text(LEFT_PX - 10, TOP_PX - 16, "loss", FAINT, 15, "rs")

    def line(self, values: list[float], colour: str, width_px: float) -> None:
        """The values of steps 1, 2, …"""
        points = [(self._x(step), self._y(value)) for step, value in enumerate(values, start=1)]
        self._segments(points, colour, width_px)

    def text(
        self, x: float, y: float, text: str, colour: str, size_px: int, anchor: str = "la"
    ) -> None:
        font = ImageFont.load_default(SCALE * size_px)
        self._pen.text((SCALE * x, SCALE * y), text, colour, font, anchor=anchor)

    def _segments(self, points: list[tuple[float, float]], colour: str, width_px: float) -> None:
        scaled = [(SCALE * x, SCALE * y) for x, y in points]
        self._pen.line(scaled, colour, round(SCALE * width_px), joint="curve")

    def _x(self, value: float) -> float:
        share = (value - self._x_ticks[0]) / (self._x_ticks[-1] - self._x_ticks[0])
        return LEFT_PX + share * (SIZE_PX[0] - LEFT_PX - RIGHT_PX)

    def _y(self, value: float) -> float:
        share = (value - self._y_ticks[0]) / (self._y_ticks[-1] - self._y_ticks[0])
        return SIZE_PX[1] - BOTTOM_PX - share * (SIZE_PX[1] - TOP_PX - BOTTOM_PX)
