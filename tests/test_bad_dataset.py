"""Forty ways in which a folder of pictures can be wrong or only look wrong, one row each.

What stops names its file; with `on_bad_file` "skip" the rest of the dataset goes on without it.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from atelier.trainers.buckets import Resolution
from atelier.trainers.caching import cache_latents
from atelier.trainers.captions import CaptionSettings
from atelier.trainers.dataset import Dataset
from atelier.trainers.image_folder import image_folder
from PIL import Image, ImageFile

GOOD = "good.png"
NO_PICTURE = "is damaged, cut off or not a picture"


class Row(NamedTuple):
    name: str
    make: Callable[[Path], object]
    """Puts something beside good.png in a folder."""
    words: str = ""
    """Of the sentence that stops it; empty where nothing is wrong."""
    file: str = ""
    """Which the sentence names, and which is left out when bad files are skipped."""
    warning: str = ""
    """Words of a warning, where it trains."""
    skips: bool = True
    """Whether the rest can go on: not where it is not known to which picture something belongs."""
    settings: Mapping[str, str] = MappingProxyType({})
    """Of the captions and the folder."""


def picture(folder: Path, name: str, mode: str = "RGB", size: tuple[int, int] = (80, 80)) -> Path:
    path = folder / name
    Image.new(mode, size).save(path)
    return caption_of(path)


def caption_of(path: Path, text: str | bytes = "a caption") -> Path:
    data = text.encode() if isinstance(text, str) else text
    path.with_suffix(".txt").write_bytes(data)
    return path


def file(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: caption_of(folder / name) and (folder / name).write_bytes(data)


def noise(name: str, keep: float) -> Callable[[Path], object]:
    """A picture of noise, cut after a part of its bytes."""

    def make(folder: Path) -> None:
        path = folder / name
        Image.effect_noise((80, 80), 90).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        caption_of(path)

    return make


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG that says it has this size, with whatever pixels are in `data`."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def broken_checksum(folder: Path) -> None:
    path = picture(folder, "bad.png")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF
    path.write_bytes(data)


def animated(name: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
        caption_of(folder / name)

    return make


def with_caption(data: bytes, name: str = "bad.png") -> Callable[[Path], object]:
    return lambda folder: caption_of(picture(folder, name), data)


def without_caption(folder: Path) -> None:
    picture(folder, "bad.png").with_suffix(".txt").unlink()


def folder_as_caption(folder: Path) -> None:
    caption = picture(folder, "bad.png").with_suffix(".txt")
    caption.unlink()
    caption.mkdir()


def link_to(target: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "bad.png").symlink_to(folder / target)


def metadata(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def parquet(columns: dict[str, list[str]]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "metadata.parquet")

    return make


def mask(name: str, size: tuple[int, int]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        picture(folder, "bad.png")
        masks = folder / "masks"
        masks.mkdir()
        Image.new("L", (80, 80), 255).save(masks / GOOD)
        Image.new("L", size).save(masks / name)

    return make


def broken_mask(folder: Path) -> None:
    mask("bad.png", (80, 80))(folder)
    (folder / "masks" / "bad.png").write_bytes(b"no picture")


def second_name(folder: Path) -> None:
    Image.new("RGB", (80, 80), "blue").save(folder / "good.jpg")


def good(**options: object) -> Callable[[Path], object]:
    """A second picture, saved in some unusual way."""
    name = str(options.pop("name", "fine.png"))
    mode = str(options.pop("mode", "RGB"))

    def make(folder: Path) -> None:
        Image.new(mode, (80, 80)).save(folder / name, **options)
        caption_of(folder / name)

    return make


TABLE = "metadata file"
MASKS = {"masks": "masks"}
ROWS = [
    # Files that are no pictures.
    *(
        Row(f"zero bytes .{e}", file(f"bad.{e}", b""), NO_PICTURE, f"bad.{e}")
        for e in ("png", "jpg", "webp", "bmp")
    ),
    *(
        Row(f"cut off .{e}", noise(f"bad.{e}", 0.5), NO_PICTURE, f"bad.{e}")
        for e in ("png", "jpg", "webp", "bmp")
    ),
    Row("cut off in its head", noise("bad.jpg", 0.02), NO_PICTURE, "bad.jpg"),
    Row("text as jpg", file("bad.jpg", b"hello " * 99), NO_PICTURE, "bad.jpg"),
    Row("web page as webp", file("bad.webp", b"<html></html>"), NO_PICTURE, "bad.webp"),
    Row("drawing as png", file("bad.png", b"<svg xmlns='x'/>"), NO_PICTURE, "bad.png"),
    Row("film as jpg", file("bad.jpg", b"\0\0\0\x18ftypmp42" + bytes(99)), NO_PICTURE, "bad.jpg"),
    Row("archive as png", file("bad.png", b"PK\x03\x04" + bytes(99)), NO_PICTURE, "bad.png"),
    Row("broken checksum", broken_checksum, NO_PICTURE, "bad.png"),
    Row("pixels missing", file("bad.png", png(80, 80, b"")), NO_PICTURE, "bad.png"),
    Row("no width", file("bad.png", png(0, 80, b"")), NO_PICTURE, "bad.png"),
    Row("900 million pixels", file("bad.png", png(30_000, 30_000, b"")), "too many", "bad.png"),
    Row(
        "bomb: 60 kB that unpack to 60 MB",
        file("bad.png", png(20_000, 20_000, bytes(60_000_000))),
        "too many pixels",
        "bad.png",
    ),
    # Links and names.
    Row("link to nothing", link_to("nothing"), "Cannot read the file", "bad.png"),
    Row("link to itself", link_to("bad.png"), "Cannot read the file", "bad.png"),
    Row("folder with a picture's name", lambda folder: (folder / "bad.png").mkdir()),
    Row("hidden file", file("._bad.png", b"made by macOS")),
    Row("pipe", lambda folder: os.mkfifo(folder / "bad.png")),
    *(
        Row(f"name: {name!a}", lambda folder, name=name: picture(folder, f"{name}.png"))
        for name in (
            *("with spaces", "小猫", "котик", "قطة", "बिल्ली", "🐈", "a\nb", "--flag", "a.b.c"),
            *("$HOME", "%20", "#1", "'quoted\"", "a" * 200),
        )
    ),
    Row("two pictures of one name", second_name, warning="share a caption file: good.jpg, good.p"),
    # Pictures of unusual kinds.
    Row(
        "30,000 pixels wide",
        lambda folder: picture(folder, "wide.png", "L", (30_000, 4)),
        warning="enlarged to the training size: wide.png",
    ),
    Row(
        "1x1",
        lambda folder: picture(folder, "dot.png", size=(1, 1)),
        warning="enlarged to the training size: dot.png",
    ),
    Row("animated webp", animated("fine.webp")),
    Row("animated png", animated("fine.png")),
    *(Row(f"mode {m}", good(mode=m)) for m in ("1", "L", "LA", "P", "RGBA", "I;16")),
    Row("CMYK", good(name="fine.jpg", mode="CMYK")),
    Row("colour profile that is none", good(icc_profile=b"none")),
    Row("EXIF that is none", good(name="fine.jpg", exif=b"Exif\0\0none")),
    # Captions.
    Row("no caption", without_caption, "has no caption file bad.txt", "bad.png"),
    Row("a folder as caption", folder_as_caption, "Cannot read the file", "bad.txt"),
    Row("caption with NUL", with_caption(b"a\0b"), "not UTF-8 text", "bad.txt"),
    Row("caption in UTF-16", with_caption("a cat".encode("utf-16")), "not UTF-8", "bad.txt"),
    Row("caption in Latin-1", with_caption("K\xe4tzchen".encode("latin-1")), "not UTF", "bad.txt"),
    Row("caption with a BOM", with_caption(b"\xef\xbb\xbfa cat")),
    Row("caption of 10,000 words", with_caption(b"word " * 10_000)),
    Row("empty caption", with_caption(b""), warning="with an empty caption: bad.png"),
    # Metadata files: what is wrong in them belongs to no picture.
    Row(
        "metadata without lines",
        metadata("metadata.jsonl", ""),
        "has no caption in",
        GOOD,
        skips=False,
        settings={"source": TABLE},
    ),
    Row(
        "metadata that is no JSON",
        metadata("metadata.jsonl", "{"),
        "not a JSON object",
        "metadata.jsonl",
        skips=False,
        settings={"source": TABLE},
    ),
    Row(
        "metadata out of the folder",
        metadata("metadata.jsonl", json.dumps({"file_name": "../x.png", "text": ""})),
        "must be the path of a picture below",
        "metadata.jsonl",
        skips=False,
        settings={"source": TABLE},
    ),
    Row(
        "metadata of an absolute path",
        metadata("metadata.jsonl", json.dumps({"file_name": "/etc/x.png", "text": ""})),
        "must be the path of a picture below",
        "metadata.jsonl",
        skips=False,
        settings={"source": TABLE},
    ),
    Row(
        "csv of too many values",
        metadata("metadata.csv", "file_name,text\ngood.png,a,b"),
        "has 3 values for 2 columns",
        "metadata.csv",
        skips=False,
        settings={"source": TABLE},
    ),
    Row(
        "parquet with the wrong columns",
        parquet({"image": ["good.png"], "label": ["a"]}),
        "has no column text or caption",
        "metadata.parquet",
        skips=False,
        settings={"source": TABLE},
    ),
    Row(
        "parquet that is none",
        metadata("metadata.parquet", "PAR1"),
        "cannot be read as parquet",
        "metadata.parquet",
        skips=False,
        settings={"source": TABLE},
    ),
    # Masks.
    Row(
        "mask of another size",
        mask("bad.png", (80, 64)),
        "80x64 pixels and its picture 80x80",
        "bad.png",
        settings=MASKS,
    ),
    Row("no mask", mask("other.png", (80, 80)), "has no mask in", "bad.png", settings=MASKS),
    Row("mask that is none", broken_mask, NO_PICTURE, "bad.png", settings=MASKS),
]
BAD = [row for row in ROWS if row.words]


@pytest.fixture(autouse=True)
def strict_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other packs let Pillow accept half a picture; here it must not matter."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


def trained(folder: Path, row: Row, **options: object) -> tuple[set[str], tuple[str, ...]]:
    """The names of the pictures that come to be encoded, and all warnings."""
    settings = dict(row.settings)
    masks = folder / str(settings.pop("masks")) if "masks" in settings else None
    subset = image_folder(
        folder,
        resolution=Resolution(width=64, height=64),
        captions=CaptionSettings(**settings),
        masks=masks,
        index_folder=folder.parent / "index",
        **options,
    )
    told = list(subset.warnings)
    cache = cache_latents(
        Dataset(subsets=(subset,)), encode, "vae", folder.parent / "cache", on_skip=told.append
    )
    names = {record.id: Path(record.path).name for record in subset.records}
    return {names[entry.record] for entry in cache.entries}, tuple(told)


def encode(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    latents = torch.zeros(len(pixels), 16, 8, 8)
    return latents, latents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (80, 80), "red").save(tmp_path / "pictures" / GOOD)
    caption_of(tmp_path / "pictures" / GOOD)
    return tmp_path / "pictures"


def test_there_are_forty_kinds() -> None:
    assert len(ROWS) >= 40
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row.name))
def test_each_kind_is_named_or_trained(folder: Path, row: Row) -> None:
    row.make(folder)
    if row.words:
        with pytest.raises(ValueError, match=re.escape(row.words)) as caught:
            trained(folder, row)
        assert row.file in str(caught.value)
        return
    names, told = trained(folder, row)
    expected = {path.name for path in folder.iterdir() if path.with_suffix(".txt").is_file()}
    pictures = {name for name in expected if is_picture(folder / name)}
    assert names == pictures
    assert [text for text in told if row.warning and row.warning in text] or not row.warning


@pytest.mark.parametrize("row", [row for row in BAD if row.skips], ids=lambda row: ascii(row.name))
def test_the_rest_goes_on_when_the_user_chose_so(folder: Path, row: Row) -> None:
    row.make(folder)
    for _ in range(2):  # and again from what is remembered
        names, told = trained(folder, row, on_bad_file="skip")
        assert names == {GOOD}
        (sentence,) = (text for text in told if text.startswith("Left out: "))
        assert row.words in sentence
        assert row.file in sentence


@pytest.mark.parametrize(
    "row", [row for row in BAD if not row.skips], ids=lambda row: ascii(row.name)
)
def test_what_belongs_to_no_picture_stops_in_any_case(folder: Path, row: Row) -> None:
    row.make(folder)
    with pytest.raises(ValueError, match=re.escape(row.words)):
        trained(folder, row, on_bad_file="skip")


def is_picture(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, ValueError):
        return False
    return True
