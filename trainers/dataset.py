"""Pictures and captions as a description: what to train on, without any pixels.

The caches turn it into tensors later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .buckets import Resolution, Size, is_enlarged
from .captions import CaptionSettings, caption_variants, listed, read_captions
from .config import require
from .pictures import Crop, Filter, Transform, decode
from .scan import PICTURE_EXTENSIONS, ContentHashes, OnBadFile, OnProgress, scan_folder

_SEED = 0
"""Of the orders of shuffled tags: they are encoded once, whatever the seed of a training."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture and the texts it is trained with."""

    path: str
    """Absolute path of the picture."""
    texts: tuple[tuple[str, ...], ...]
    """One or more captions, and of each the variants that are encoded: trigger, prefix and suffix
    included."""
    content: str
    """SHA-256 of the file's bytes, in hex."""
    width: int
    """Pixels, after the EXIF rotation."""
    height: int
    """Pixels, after the EXIF rotation."""
    repeats: int = 1
    """How often the picture is seen in an epoch."""

    @property
    def id(self) -> str:
        """Name of the sample wherever it lies: 16 hex digits of its bytes and its captions."""
        captions = "\0".join(variants[0] for variants in self.texts)
        return hashlib.sha256(f"{self.content}\0{captions}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """How the pictures of a dataset become pixels, their size aside."""

    crop: Crop = "center"
    """Which part is kept of a picture that has not the shape of its size."""
    filter: Filter = "lanczos"
    """How pixels are resampled."""
    max_side: int = 0
    """Pixels; a picture with a longer side is shrunk to it before the crop. 0 is off."""
    flip: bool = False
    """Train each picture also mirrored, every other time: a second entry in the cache."""

    def __post_init__(self) -> None:
        Transform(width=64, height=64, **self._facts("checked"))

    def transforms(self, size: Size, seed: str) -> tuple[Transform, ...]:
        """What is encoded of a picture at `size`; `seed` is a text that belongs to the picture."""
        facts = self._facts(seed)
        upright = Transform(width=size[0], height=size[1], **facts)
        return (upright, dataclasses.replace(upright, flip=True)) if self.flip else (upright,)

    def _facts(self, seed: str) -> dict[str, Any]:
        random = {"seed": seed} if self.crop == "random" else {}
        return {"crop": self.crop, "filter": self.filter, "max_side": self.max_side, **random}


DEFAULT_CAPTIONS, DEFAULT_PICTURES = CaptionSettings(), PictureSettings()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Records in a fixed order, and how they are trained."""

    records: tuple[Record, ...]
    resolution: Resolution
    name: str
    pictures: PictureSettings = DEFAULT_PICTURES
    captions: CaptionSettings = DEFAULT_CAPTIONS
    told: tuple[str, ...] = ()
    """Warnings of reading it."""

    def size_of(self, record: Record) -> Size:
        """(width, height) in pixels at which the record is trained."""
        return self.resolution.size_for(record.width, record.height, record.content)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every distinct text that is encoded, in the order of the records."""
        return tuple(
            dict.fromkeys(
                text for record in self.records for variants in record.texts for text in variants
            )
        )

    @property
    def num_samples(self) -> int:
        """Pictures seen in one epoch."""
        return sum(record.repeats for record in self.records)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what trains but is probably not meant."""
        small = [_file_name(record) for record in self.records if self._is_upscaled(record)]
        silent = [_file_name(record) for record in self.records if ("",) in record.texts]
        messages = [*self.told]
        if small:
            messages.append(f"Pictures enlarged to the training size: {listed(small)}.")
        if silent:
            messages.append(f"Pictures with an empty caption: {listed(silent)}.")
        return tuple(messages)

    def _is_upscaled(self, record: Record) -> bool:
        return is_enlarged((record.width, record.height), self.size_of(record))


def image_folder(
    path: str | Path,
    *,
    resolution: Resolution,
    repeats: int = 1,
    pictures: PictureSettings = DEFAULT_PICTURES,
    captions: CaptionSettings = DEFAULT_CAPTIONS,
    on_bad_file: OnBadFile = "stop",
    index_folder: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Dataset:
    """The pictures of one folder, sorted by name, each with its captions.

    Headers are read and bytes hashed here, once for each version of a file if `index_folder` is
    given to remember them; pixels are decoded when they are encoded. Subfolders are not read.
    `on_progress(done, total)` may raise to stop.

    Raises:
        ValueError: the folder is missing or holds no pictures, a file is no picture, or a caption
            is missing or not UTF-8. The message names the file. With `on_bad_file` "skip" files
            that are no pictures are left out, and named in the warnings.
    """
    require(repeats >= 1, f"Repeats must be 1 or more, got {repeats}. 1 shows each picture once.")
    scan = scan_folder(path, index_folder, on_bad_file=on_bad_file, on_progress=on_progress)
    _require_some(scan.pictures, scan.folder)
    written, warnings = read_captions([Path(p.path) for p in scan.pictures], captions)
    hashes = ContentHashes(index_folder / "contents.json" if index_folder else None)
    contents = hashes.of_all(scan.pictures, on_progress).digests
    records = (
        Record(
            path=picture.path,
            texts=tuple(caption_variants(caption, captions, _SEED, content) for caption in some),
            content=content,
            width=picture.width,
            height=picture.height,
            repeats=repeats,
        )
        for picture, some, content in zip(scan.pictures, written, contents, strict=True)
    )
    return Dataset(
        records=tuple(records),
        resolution=resolution,
        name=Path(scan.folder).name,
        pictures=pictures,
        captions=captions,
        told=(*warnings, *(f"Left out: {sentence}" for _, sentence in scan.skipped)),
    )


def picture_files(folder: str | Path) -> list[Path]:
    """The pictures directly in `folder`, as absolute paths sorted by name.

    Raises:
        ValueError: the folder is missing or holds no pictures.
    """
    folder = Path(os.path.abspath(folder))
    require(folder.is_dir(), f"The picture folder {folder} does not exist. Check its name.")
    # macOS leaves "._name.jpg" files of its own beside pictures on shared drives.
    visible = (path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in visible if path.suffix.lower() in PICTURE_EXTENSIONS]
    files = sorted((path for path in found if path.is_file()), key=lambda path: path.name)
    _require_some(files, folder)
    return files


def _require_some(pictures: Sequence[object], folder: str | Path) -> None:
    kinds = ", ".join(extension[1:] for extension in PICTURE_EXTENSIONS)
    require(
        bool(pictures),
        f"The folder {folder} holds no pictures ({kinds}). Put them directly into it: "
        "subfolders are not read.",
    )


def open_picture(record: Record) -> Image.Image:
    """The decoded picture of a record.

    Raises:
        ValueError: the file is gone, or its content is no longer the one the record describes.
    """
    data = _read(Path(record.path))
    require(
        _digest(data) == record.content,
        f"The picture {record.path} changed after the dataset was read. Queue the graph again.",
    )
    return decode(data, record.path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"Cannot read the file {path}: {error.strerror}.") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_name(record: Record) -> str:
    return Path(record.path).name
