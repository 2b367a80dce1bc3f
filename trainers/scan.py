"""What lies in a folder of pictures, from names, times and headers: no picture is decoded.

Headers of unchanged files are not read again: an index in a cache folder remembers them. A picture
cut off after its header is found later, when it is decoded.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from PIL import Image

from .buckets import Size
from .checks import require
from .file_index import is_settled, read_rows, write_rows
from .files import not_read
from .pictures import display_size, has_unusable_profile
from .progress import OnProgress, throttled

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

OnBadFile = Literal["stop", "skip"]
ON_BAD_FILE: tuple[OnBadFile, ...] = ("stop", "skip")

_FACTS = (int, int, int, int, bool, int, bool)
"""Of a row: size in bytes, mtime in ns, width, height, has alpha, number of frames, has a colour
profile that is ignored."""

_TAIL_BYTES = 1 << 16
_LATE_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
"""Chunks of a PNG that may hold an orientation, looked for in the end of the file."""
_WORKERS = 2
_FILES_PER_TURN = 64


class Picture(NamedTuple):
    """One picture file. A tuple, since a folder may have 100,000."""

    path: str
    """Absolute."""
    num_bytes: int
    mtime_ns: int
    """Time of the last change, in nanoseconds."""
    width: int
    """Pixels, after the EXIF rotation."""
    height: int
    """Pixels, after the EXIF rotation."""
    has_alpha: bool
    """There is transparency, or room for it."""
    num_frames: int
    """1, or more if it is animated."""
    has_unusable_profile: bool = False
    """Its colour profile is broken, or for another kind of picture, and is ignored."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What was found in a folder."""

    folder: str
    """Absolute."""
    pictures: tuple[Picture, ...]
    """Sorted by path."""
    other_files: frozenset[str]
    """Absolute paths of the visible files that are no pictures, such as captions."""
    skipped: tuple[tuple[str, str], ...]
    """Path of each bad file, and the sentence that says what is wrong with it."""
    num_read: int
    """Pictures whose header was read: the index did not know them."""


def scan_folder(
    folder: str | Path,
    index_folder: Path | None,
    *,
    recursive: bool = False,
    on_bad_file: OnBadFile = "stop",
    on_progress: OnProgress | None = None,
) -> Scan:
    """The pictures in `folder`, and with `recursive` in its subfolders, also through links.

    Hidden files and folders are not looked at. `index_folder` is for our own files, one for each
    scanned folder; None remembers nothing. A folder without pictures is no error here.

    Raises:
        ValueError: the folder is missing, or its index cannot be written. With `stop` also when a
            file or subfolder cannot be read or a file with a picture's name is none; the message
            names it. With `skip` these are in `Scan.skipped`.
    """
    folder = Path(os.path.abspath(folder))
    require(folder.is_dir(), f"The picture folder {folder} does not exist. Check its name.")
    require(
        on_bad_file in ON_BAD_FILE,
        f"on_bad_file must be one of {', '.join(ON_BAD_FILE)}, got {on_bad_file!r}.",
    )
    bad = BadFiles(on_bad_file)
    files, other_files = _list_files(str(folder), recursive, bad)
    index = index_folder / _index_name(folder, recursive) if index_folder else None
    known = read_rows(index, _FACTS) if index else {}
    prefix_length = len(os.path.join(folder, ""))
    report = throttled(on_progress)
    pictures: list[Picture] = []
    fresh: dict[str, tuple] = {}
    num_read = 0
    try:
        for number, (path, num_bytes, mtime_ns) in enumerate(files, start=1):
            name = path[prefix_length:]
            row = known.get(name)
            if row and row[:2] == (num_bytes, mtime_ns):
                pictures.append(Picture(path, *row))
            else:
                num_read += 1
                try:
                    picture = Picture(path, num_bytes, mtime_ns, *_read_header(path))
                except ValueError as error:
                    bad.add(path, error)
                else:
                    pictures.append(picture)
                    if is_settled(mtime_ns):
                        fresh[name] = picture[1:]
            report(number, len(files))
    finally:
        if index and (fresh or len(pictures) != len(known)):
            names = {path[prefix_length:] for path, *_ in files}
            kept = {name: row for name, row in known.items() if name in names}
            write_rows(index, kept | fresh)
    return Scan(
        folder=str(folder),
        pictures=tuple(pictures),
        other_files=frozenset(other_files),
        skipped=tuple(bad.found),
        num_read=num_read,
    )


def scan_files(
    paths: Sequence[str],
    folder: str | Path,
    *,
    on_bad_file: OnBadFile = "stop",
    on_progress: OnProgress | None = None,
) -> Scan:
    """These files in their order, as `scan_folder` of a folder that holds them and others.

    Nothing is remembered. `paths` are absolute and may name a file twice.

    Raises:
        ValueError: as `scan_folder`.
    """
    bad = BadFiles(on_bad_file)
    report = throttled(on_progress)
    pictures: list[Picture] = []
    for number, path in enumerate(paths, start=1):
        try:
            try:
                facts = os.stat(path)
            except OSError as error:
                raise not_read(path, error) from error
            pictures.append(Picture(path, facts.st_size, facts.st_mtime_ns, *_read_header(path)))
        except ValueError as error:
            bad.add(path, error)
        report(number, len(paths))
    return Scan(
        folder=os.path.abspath(folder),
        pictures=tuple(pictures),
        other_files=frozenset(),
        skipped=tuple(bad.found),
        num_read=len(paths),
    )


class BadFiles:
    """Raises what is wrong with a file, or collects it."""

    def __init__(self, choice: OnBadFile) -> None:
        self._choice = choice
        self.found: list[tuple[str, str]] = []

    def add(self, path: str, error: ValueError) -> None:
        if self._choice == "stop":
            raise error
        self.found.append((path, str(error)))


def _list_files(
    folder: str, recursive: bool, bad: BadFiles
) -> tuple[list[tuple[str, int, int]], set[str]]:
    """(path, size, mtime) of the pictures, sorted; paths of the other visible files."""
    pictures: list[tuple[str, int, int]] = []
    others: set[str] = set()
    seen: set[str] = set()
    pending = [folder]
    while pending:
        current = pending.pop()
        real = os.path.realpath(current)
        if real in seen:  # a link may lead back up
            continue
        seen.add(real)
        subfolders = []
        for entry in _entries(current, bad):
            is_picture = entry.name.lower().endswith(PICTURE_EXTENSIONS)
            try:
                if entry.is_dir():
                    subfolders.append(entry.path)
                elif is_picture:
                    facts = entry.stat()
                    if stat.S_ISREG(facts.st_mode):  # opening a pipe would wait for ever
                        pictures.append((entry.path, facts.st_size, facts.st_mtime_ns))
                elif entry.is_file():
                    others.add(entry.path)
            except OSError as error:  # a link to nothing or to itself
                if is_picture:
                    bad.add(entry.path, not_read(entry.path, error))
        if recursive:
            pending += sorted(subfolders, reverse=True)  # the first name is taken next
    return sorted(pictures), others


def _entries(folder: str, bad: BadFiles) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            # macOS leaves "._name.jpg" files of its own beside pictures on shared drives.
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        message = f"Cannot read the folder {folder}: {error.strerror}."
        bad.add(folder, ValueError(message))
        return []


def _read_header(path: str) -> tuple[int, int, bool, int, bool]:
    """What a `Picture` has from its width on."""
    try:
        with open(path, "rb") as file, Image.open(file) as image:
            width, height = _display_size(image, file)
            # A second frame in a JPEG (MPO) is a preview or a gain map.
            num_frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            is_ignored = has_unusable_profile(image)
            return width, height, image.has_transparency_data, num_frames, is_ignored
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"The picture {path} has too many pixels to be opened. Make it smaller."
        ) from error
    except (OSError, SyntaxError, ValueError, TypeError) as error:  # Pillow's plugins raise all
        if isinstance(error, OSError) and error.errno:
            raise not_read(path, error) from error
        raise ValueError(
            f"The picture {path} is damaged, cut off or not a picture. Replace or remove it."
        ) from error


def _display_size(image: Image.Image, file: BinaryIO) -> Size:
    # Pillow decodes a whole PNG to look for EXIF after the pixels, where some programs write it.
    if image.format == "PNG" and not _may_be_rotated(image, file):
        return image.size
    return display_size(image)


def _may_be_rotated(png: Image.Image, file: BinaryIO) -> bool:
    """Whether a PNG has an orientation before its pixels, or metadata after them."""
    if "exif" in png.info or "Raw profile type exif" in png.info:
        return True
    if "tiff:Orientation" in png.info.get("XML:com.adobe.xmp", ""):
        return True
    position = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    tail = file.read()
    file.seek(position)
    return any(mark in tail for mark in _LATE_METADATA)


def _index_name(folder: Path, recursive: bool) -> str:
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
    return f"{digest}_tree.json" if recursive else f"{digest}.json"
