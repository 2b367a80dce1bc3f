"""Text in any script as pixels, with the fonts that this computer has.

Pillow brings one font, of Latin letters. Where it lacks a character, the first font of a list that
is installed and has it is taken; a character that none of them has is written as its escape.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

_SYSTEM_FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "segoeui.ttf", "Helvetica.ttc"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf"),
    *("NotoSansSC-Regular.ttf", "SourceHanSansSC-Regular.otf", "SourceHanSansCN-Regular.otf"),
    *("msyh.ttc", "msyh.ttf", "simhei.ttf", "simsun.ttc"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "STHeiti Light.ttc"),
    *("wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("meiryo.ttc", "YuGothM.ttc", "malgun.ttf", "AppleSDGothicNeo.ttc"),
    *("arial.ttf", "Arial Unicode.ttf", "Nirmala.ttc", "LeelawUI.ttf", "seguisym.ttf"),
    *("FreeSans.ttf", "LiberationSans-Regular.ttf", "unifont.otf", "unifont.ttf"),
)
"""Letters of Europe and Arabic first, then Chinese, Japanese and Korean, then whatever is left."""

# A line may end after a word, and after every sign of the scripts that know no spaces.
_SIGNS = r"\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef"
_UNITS = re.compile(rf"[{_SIGNS}]|[^\s{_SIGNS}]+\s?|\s")

_MISSING = "\U0010fffe"
"""No font has it: it is drawn as the font's sign for what it lacks."""


class Face:
    """Text of one size in pixels."""

    def __init__(self, size: float) -> None:
        self._size = size

    def length(self, text: str) -> float:
        """Width in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(
        self, pen: ImageDraw.ImageDraw, left: float, baseline: float, text: str, colour: str
    ) -> float:
        """Write one line; returns where it ends."""
        for font, part in self._runs(text):
            pen.text((left, baseline), part, colour, font, anchor="ls")
            left += font.getlength(part)
        return left

    def shortened(self, text: str, width: float) -> str:
        """The start of the text that fits into `width`, with an ellipsis if that is not all."""
        if self.length(text) <= width:
            return text
        fits = bisect_left(
            range(len(text)), True, key=lambda n: self.length(text[:n] + "…") > width
        )
        return f"{text[: max(0, fits - 1)].rstrip()}…"

    def wrapped(self, text: str, width: float) -> list[tuple[int, int]]:
        """Start and end of each line of the text that is broken to fit into `width`."""
        lines: list[tuple[int, int]] = []
        start = end = 0
        for unit in _UNITS.finditer(text):
            if end > start and self.length(text[start : unit.end()].rstrip()) > width:
                lines.append((start, end))
                start = end
            while self.length(text[start : unit.end()].rstrip()) > width:  # a word longer than that
                cut = max(1, len(self.shortened(text[start : unit.end()], width)) - 1)
                lines.append((start, start + cut))
                start += cut
            end = unit.end()
        return [*lines, (start, end)] if end > start else lines

    def _runs(self, text: str) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """Parts of the text, each with the font that draws all of it."""
        part, name = "", ""
        for character in text:
            found = name if part and _joins(character) else font_of(character) or ""
            if part and found != name:
                yield _font(name, self._size), part
                part = ""
            part, name = part + character, found
        if part:
            yield _font(name, self._size), part


def drawable(text: str) -> str:
    """The text in one line, with escapes for the characters that no font here can draw."""
    return "".join(
        character if _joins(character) or font_of(character) is not None else _escape(character)
        for character in " ".join(text.split())
    )


@lru_cache(maxsize=65536)
def font_of(character: str) -> str | None:
    """The name of the font that draws a character: empty for Pillow's own, None without one."""
    if unicodedata.category(character) in ("Cc", "Cs", "Cn", "Co"):
        return None
    names = ("", *_installed())
    return next((name for name in names if character == " " or _has(name, character)), None)


def _joins(character: str) -> bool:
    """Whether it changes the character before it, as an accent does."""
    return unicodedata.category(character) in ("Mn", "Me", "Mc", "Cf")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _has(name: str, character: str) -> bool:
    # Pillow does not say which characters a font has.
    drawn = _drawn(name, character)
    return any(drawn) and drawn != _drawn(name, _MISSING)


@lru_cache(maxsize=256)  # the one of what is missing is asked for again and again
def _drawn(name: str, character: str) -> bytes:
    image = Image.new("L", (64, 64))
    ImageDraw.Draw(image).text((16, 16), character, 255, _font(name, 24))
    return image.tobytes()


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    return tuple(name for name in _SYSTEM_FONTS if _is_installed(name))


def _is_installed(name: str) -> bool:
    try:
        return bool(_font(name, 24))
    except OSError:
        return False


@lru_cache(maxsize=256)
def _font(name: str, size: float) -> ImageFont.FreeTypeFont:
    """Raises OSError if there is no such font."""
    font = ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels have FreeType"
    return font
