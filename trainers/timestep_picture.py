"""What Schedule Settings mean, as a picture: how often each share of noise is trained, and how much
its error counts. Drawn with PIL alone, from draws as a training makes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .checks import require
from .flow import seeded
from .flow_settings import PARAMETERS, FlowSettings, TimestepSettings
from .fonts import Face
from .loss_plot import log_ticks, ticks
from .losses import loss_weight
from .timesteps import SIGMA_MIN, draw_sigmas, flux_shift

SIZE = (540, 380)
"""Width and height in pixels: at half of it, as on a new node, all of its text can be read."""
NUM_BINS = 50
_NUM_DRAWS = 1_000_000
_LISTS = ("fast", "custom")
_MOST_VALUES = 100
"""A list with more values than these is drawn as any distribution."""
_CUT = 1.6
"""A bin that is this much higher than the second one is cut off, so that the others are seen."""
_LARGE_RANGE = 20.0
"""Weights whose largest is this many times the smallest need a logarithmic axis."""
_SCALE = 2
"""Drawn at twice the size and halved, which smooths the lines."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 68, 92, 66
_INK, _FAINT, _RULE = "#1b1b1b", "#555555", "#e2e2e2"
_OFTEN, _BAR, _MUCH = "#1d4f91", "#a9c3e6", "#b3480a"


def timestep_picture(
    settings: FlowSettings, *, width: int = 1024, height: int = 1024
) -> Image.Image:
    """Density of sigma as bars, and the weight of the loss as a line, from picture to noise.

    Args:
        width, height: pixels of the trained pictures, by which the automatic shift goes.
    """
    require(
        min(width, height) >= 16,
        f"The pictures must be at least 16 pixels wide and high, got {width}x{height}.",
    )
    num_tokens = (width // 16) * (height // 16)
    sigma = draw_sigmas(
        settings.timesteps, _NUM_DRAWS, num_tokens=num_tokens, generator=seeded(0, "picture")
    )
    plot = _Plot(describe(settings.timesteps, width, height))
    is_list = settings.timesteps.sampling in _LISTS
    values, counts = sigma.unique(return_counts=True) if is_list else (sigma, sigma)
    if is_list and len(values) <= _MOST_VALUES:
        plot.draw_values(values.tolist(), (counts / len(sigma)).tolist())
    else:
        plot.draw_density(density(sigma))
    places = torch.linspace(SIGMA_MIN, 1, 500)
    weights = loss_weight(settings.loss.weight, places)
    plot.draw_weights(places.tolist(), weights.tolist(), settings.loss.weight)
    return plot.picture()


def density(sigma: Tensor) -> list[float]:
    """Of draws in 0..1, in NUM_BINS equal parts: 1 everywhere if all are alike.

    A draw at the border of two parts belongs to the one below, as 0 is never drawn and 1 is.
    """
    parts = (sigma * NUM_BINS - 1e-3).ceil().long().clamp(1, NUM_BINS) - 1
    counts = torch.bincount(parts, minlength=NUM_BINS)
    return (counts / len(sigma) * NUM_BINS).tolist()


def describe(settings: TimestepSettings, width: int, height: int) -> str:
    """The sampling and its shift in a few words."""
    recipe = TimestepSettings()
    own = [
        f"{name} {getattr(settings, name):.4g}"
        for name in PARAMETERS.get(settings.sampling, ())
        if getattr(settings, name) != getattr(recipe, name)
    ]
    words = [f"{settings.sampling} ({', '.join(own)})" if own else settings.sampling]
    if settings.auto_shift or settings.sampling == "flux_shift":
        shift = flux_shift((width // 16) * (height // 16))
        words.append(f"shift {shift:.3g} at {width}x{height}")
    elif settings.shift:
        words.append(f"shift {settings.shift:.4g}")
    return ", ".join(words)


class _Plot:
    """A picture with sigma from left to right, and an axis for the bars and one for the line."""

    def __init__(self, title: str) -> None:
        width, height = SIZE
        self._image = Image.new("RGB", (_SCALE * width, _SCALE * height), "white")
        self._pen = ImageDraw.Draw(self._image)
        self._bottom = height - _BOTTOM
        self._labels: list[tuple[float, float, str]] = []
        self._text(14, 34, title, _INK, min(22, 22 * (width - 28) / Face(22).length(title)))
        for number in range(5):
            x = self._x(number / 4)
            self._line([(x, self._bottom), (x, self._bottom + 6)], _FAINT, 1.5)
            label = f"{number / 4:g}"
            self._text(x, self._bottom + 26, label, _FAINT, 20, align=0.5)
        below = SIZE[1] - 12
        self._text(self._x(0) - 8, below, "picture", _INK, 22)
        self._text(self._x(0.5), below, "share of noise (sigma)", _FAINT, 20, align=0.5)
        self._text(self._x(1) + 8, below, "noise", _INK, 22, align=1)

    def picture(self) -> Image.Image:
        for x, baseline, label in self._labels:  # at last: the line may cross them
            half = Face(18).length(label) / 2
            box = (x - half, baseline - 14, x + half, baseline + 1)
            self._pen.rectangle([round(_SCALE * value) for value in box], "white")
            self._text(x, baseline, label, _OFTEN, 18, align=0.5)
        return self._image.resize(SIZE, Image.Resampling.LANCZOS)

    def draw_density(self, heights: Sequence[float]) -> None:
        highest, second = sorted(heights)[-1:-3:-1]
        is_cut = highest > _CUT * second
        numbers = ticks(0, second if is_cut else highest)
        self._left_axis("density: how often", numbers)
        top = numbers[-1]
        for number, value in enumerate(heights):
            left, right = self._x(number / NUM_BINS), self._x((number + 1) / NUM_BINS)
            self._bar(left, right, min(value, top) / top)
            if is_cut and value == highest:
                self._write_cut((left + right) / 2, f"{value:.3g}")

    def draw_values(self, values: Sequence[float], shares: Sequence[float]) -> None:
        """Single values, each with its share of the draws."""
        numbers = [number for number in ticks(0, 1.2 * max(shares)) if number <= 1]
        self._left_axis("share of the draws", numbers, percent=True)
        half = min(6.0, 150 / len(values))
        left, right = _LEFT + half, SIZE[0] - _RIGHT - half
        free_from = 0.0
        for value, share in zip(values, shares, strict=True):
            x, y = min(max(self._x(value), left), right), self._y(share / numbers[-1])
            self._bar(x - half, x + half, share / numbers[-1])
            label = f"{100 * share:.0f} %"
            room = Face(18).length(label) / 2 + 4
            if y < _TOP + 16:  # no room above it
                x, y = x + (half + room if value < 0.5 else -half - room), y + 24
            x = min(x, right + half - room)
            if x - room >= free_from:
                self._labels.append((x, y - 6, label))
                free_from = x + room

    def draw_weights(self, places: Sequence[float], weights: Sequence[float], name: str) -> None:
        low, high = min(weights), max(weights)
        is_log = low > 0 and high > _LARGE_RANGE * low
        numbers = log_ticks(low, high) if is_log else ticks(0, (2 if low == high else 1.1) * high)
        scale = torch.log10 if is_log else torch.as_tensor
        heights = scale(torch.tensor(weights, dtype=torch.float64))
        ends = scale(torch.tensor([numbers[0], numbers[-1]], dtype=torch.float64)).tolist()

        def share(value: float) -> float:
            return (value - ends[0]) / (ends[1] - ends[0])

        right = SIZE[0] - _RIGHT
        title = f"weight: {name}"
        self._text(right + _RIGHT - 14, _TOP - 18, title, _MUCH, 20, align=1)
        for number, value in zip(numbers, scale(torch.tensor(numbers)).tolist(), strict=True):
            self._text(right + 8, self._y(share(value)) + 7, _short(number), _MUCH, 20)
        points = [
            (self._x(place), self._y(share(height)))
            for place, height in zip(places, heights.tolist(), strict=True)
        ]
        self._line(points, _MUCH, 3.5)

    def _left_axis(self, title: str, numbers: Sequence[float], *, percent: bool = False) -> None:
        self._text(14, _TOP - 18, title, _OFTEN, 20)
        for number in numbers:
            y = self._y(number / numbers[-1])
            self._line([(_LEFT, y), (SIZE[0] - _RIGHT, y)], _RULE, 1.5)
            label = f"{100 * number:.3g} %" if percent else _short(number)
            self._text(_LEFT - 8, y + 7, label, _OFTEN, 20, align=1)

    def _write_cut(self, x: float, label: str) -> None:
        """The height of a bar that is higher than the picture, beside its top."""
        is_left = x < SIZE[0] / 2
        text = f"← {label}" if is_left else f"{label} →"
        shift = 12 if is_left else -12
        self._text(x + shift, _TOP + 20, text, _OFTEN, 20, align=0 if is_left else 1)

    def _bar(self, left: float, right: float, share: float) -> None:
        box = (left + 0.5, self._y(share), right - 0.5, self._bottom)
        self._pen.rectangle([round(_SCALE * value) for value in box], _BAR)

    def _line(self, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
        scaled = [(_SCALE * x, _SCALE * y) for x, y in points]
        self._pen.line(scaled, colour, round(_SCALE * width), joint="curve")

    def _text(
        self, x: float, baseline: float, text: str, colour: str, size: float, align: float = 0
    ) -> None:
        """`align` is the part of the text that lies left of x."""
        face = Face(_SCALE * size)
        face.draw(
            self._pen, _SCALE * x - align * face.length(text), _SCALE * baseline, text, colour
        )

    def _x(self, sigma: float) -> float:
        return _LEFT + sigma * (SIZE[0] - _LEFT - _RIGHT)

    def _y(self, share: float) -> float:
        return self._bottom - share * (self._bottom - _TOP)


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e+0", "e") if number >= 10_000 else f"{number:.4g}"
