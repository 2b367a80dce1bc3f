"""The demo's contact sheet: rows of pictures under the names of what they show."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 8
PICTURE_PX, GAP_PX, MARGIN_PX, LABEL_PX = 144, 10, 24, 112
TITLE_PX, HEADING_PX, BAND_GAP_PX, FOOT_PX = 72, 26, 20, 34
INK, FAINT, RULE = "#1b1b1b", "#666666", "#d8d8d8"


@dataclass(frozen=True)
class Row:
    """One row: a picture for each column."""

    label: str
    pictures: list[Image.Image]


def contact_sheet(
    columns: list[str], rows: list[Row], *, title: str, subtitle: str, footnote: str
) -> Image.Image:
    """The rows under the columns' names; more than 8 columns go on in another band below."""
    starts = range(0, len(columns), COLUMNS)
    band_px = HEADING_PX + len(rows) * (PICTURE_PX + GAP_PX) + BAND_GAP_PX
    width_px = 2 * MARGIN_PX + LABEL_PX + min(len(columns), COLUMNS) * (PICTURE_PX + GAP_PX)
    text_px = max(font(24).getlength(title), font(15).getlength(subtitle))
    size = (
        max(width_px, 2 * MARGIN_PX + round(text_px)),
        MARGIN_PX + TITLE_PX + len(starts) * band_px + FOOT_PX,
    )
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN_PX, MARGIN_PX), title, INK, font(24))
    pen.text((MARGIN_PX, MARGIN_PX + 34), subtitle, FAINT, font(15))
    for band, start in enumerate(starts):
        part = slice(start, start + COLUMNS)
        shown = [Row(row.label, row.pictures[part]) for row in rows]
        draw_band(sheet, MARGIN_PX + TITLE_PX + band * band_px, columns[part], shown)
    pen.text((MARGIN_PX, size[1] - FOOT_PX), footnote, FAINT, font(13))
    return sheet


def draw_band(sheet: Image.Image, top: int, columns: list[str], rows: list[Row]) -> None:
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(columns):
        middle = left_of(number) + PICTURE_PX // 2
        pen.text((middle, top + HEADING_PX // 2), name, INK, font(15), anchor="mm")
    for number, row in enumerate(rows):
        row_top = top + HEADING_PX + number * (PICTURE_PX + GAP_PX)
        place = (MARGIN_PX, row_top + PICTURE_PX // 2)
        pen.multiline_text(place, row.label, INK, font(16), anchor="lm", spacing=5)
        for column, picture in enumerate(row.pictures):
            left = left_of(column)
            box = (left - 1, row_top - 1, left + PICTURE_PX, row_top + PICTURE_PX)
            resized = picture.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.LANCZOS)
            sheet.paste(resized, (left, row_top))
            pen.rectangle(box, outline=RULE)


def left_of(column: int) -> int:
    return MARGIN_PX + LABEL_PX + column * (PICTURE_PX + GAP_PX)


def font(size_px: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)
