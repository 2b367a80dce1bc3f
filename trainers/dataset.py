"""Pictures and captions as a description: what to train on, without any pixels.

The caches turn it into tensors later.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from .buckets import Resolution, Size, is_enlarged
from .captions import (
    CaptionSettings,
    caption_variants,
    given_captions,
    listed,
    read_captions,
)
from .config import ALWAYS, Schedule, require
from .files import read_bytes
from .masks import ALPHA, Mask, alpha_masks, folder_masks, latent_weights, mask_image
from .pictures import PictureSettings, Transform, decode
from .scan import (
    PICTURE_EXTENSIONS,
    BadFiles,
    ContentHashes,
    OnBadFile,
    OnProgress,
    Picture,
    Scan,
    scan_folder,
)

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
    mask: Mask | None = None
    """Without one all of the picture counts."""
    repeats: int = 1
    """How often the picture is seen in an epoch."""

    @property
    def id(self) -> str:
        """Name of the sample wherever it lies: 16 hex digits of its bytes and its captions."""
        captions = "\0".join(variants[0] for variants in self.texts)
        return hashlib.sha256(f"{self.content}\0{captions}".encode()).hexdigest()[:16]


DEFAULT_CAPTIONS, DEFAULT_PICTURES = CaptionSettings(), PictureSettings()


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Records in a fixed order that are trained alike, at sizes of one area."""

    records: tuple[Record, ...]
    resolution: Resolution
    name: str
    pictures: PictureSettings = DEFAULT_PICTURES
    captions: CaptionSettings = DEFAULT_CAPTIONS
    on_bad_file: OnBadFile = "stop"
    """What is done with a picture that turns out to be bad when it is decoded."""
    schedule: Schedule = ALWAYS
    is_regularization: bool = False
    """Whether its pictures train towards what the model draws without the LoRA."""
    told: tuple[str, ...] = ()
    """Warnings of reading it."""

    def size_of(self, record: Record) -> Size:
        """(width, height) in pixels at which the record is trained."""
        return self.resolution.size_for(record.width, record.height, record.content)

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


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a training sees: one subset, or several that take turns."""

    subsets: tuple[Subset, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every distinct text that is encoded, in the order of the records."""
        records = (record for subset in self.subsets for record in subset.records)
        texts = (text for record in records for variants in record.texts for text in variants)
        return tuple(dict.fromkeys(texts))

    @property
    def num_samples(self) -> int:
        """Pictures seen in one epoch."""
        return sum(subset.num_samples for subset in self.subsets)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what trains but is probably not meant, each once."""
        return tuple(dict.fromkeys(text for subset in self.subsets for text in subset.warnings))

    def at_sizes(self, sizes: Sequence[Size]) -> Dataset:
        """This, and every picture of it once more at each further (width, height) in pixels."""
        further = (
            dataclasses.replace(subset, resolution=subset.resolution.at(size))
            for size in sizes
            for subset in self.subsets
        )
        return Dataset(subsets=(*self.subsets, *further))

    def scheduled(self, schedule: Schedule, *, is_regularization: bool) -> Dataset:
        """This with one schedule for all of it: subsets share the probability by their samples."""

        def share(subset: Subset) -> Schedule:
            probability = schedule.probability * subset.num_samples / self.num_samples
            return dataclasses.replace(schedule, probability=probability)

        return Dataset(
            subsets=tuple(
                dataclasses.replace(
                    subset, schedule=share(subset), is_regularization=is_regularization
                )
                for subset in self.subsets
            )
        )


def image_folder(
    path: str | Path,
    *,
    resolution: Resolution,
    repeats: int = 1,
    pictures: PictureSettings = DEFAULT_PICTURES,
    captions: CaptionSettings = DEFAULT_CAPTIONS,
    masks: str | Path | None = None,
    on_bad_file: OnBadFile = "stop",
    index_folder: Path | None = None,
    on_progress: OnProgress | None = None,
    recursive: bool = False,
    written: Mapping[str, tuple[str, ...]] | None = None,
    keep: Callable[[Picture], bool] | None = None,
) -> Subset:
    """The pictures of one folder, sorted by name, each with its captions.

    `masks` is a folder of masks, or `masks.ALPHA` for the transparency of the pictures. Headers are
    read and bytes hashed here, once for each version of a file if `index_folder` is
    given to remember them; pixels are decoded when they are encoded. Subfolders are read if
    `recursive`. `written` is a table of captions, as `captions.given_captions` has it; pictures for
    which `keep` is false are left out. `on_progress(done, total)` may raise to stop.

    Raises:
        ValueError: the folder is missing or holds no pictures, a file is no picture, a caption is
            missing or not UTF-8, or a mask is missing or no mask of its picture. The message names
            the file. With `on_bad_file` "skip" pictures that are none or whose caption or mask is
            wrong are left out, and named in the warnings.
    """
    require(repeats >= 1, f"Repeats must be 1 or more, got {repeats}. 1 shows each picture once.")
    scan = scan_folder(
        path, index_folder, recursive=recursive, on_bad_file=on_bad_file, on_progress=on_progress
    )
    _require_some(scan.pictures, scan.folder, recursive=recursive)
    told: list[str] = []
    if keep:
        kept, dropped = [], []
        for picture in scan.pictures:
            (kept if keep(picture) else dropped).append(picture)
        names = [Path(picture.path).name for picture in dropped]
        told = [f"Left out by the settings of the dataset: {listed(names)}."] if names else []
        require(
            bool(kept),
            f"The settings of the dataset leave out all pictures of {scan.folder}. Check its "
            "limits of size and shape.",
        )
        scan = dataclasses.replace(scan, pictures=tuple(kept))
    paths, root = [Path(picture.path) for picture in scan.pictures], Path(scan.folder)
    bad = BadFiles(on_bad_file)
    if written is None:
        texts, warnings = read_captions(paths, captions, root, bad.add)
    else:
        texts, warnings = given_captions(paths, written, captions, root, bad.add)
    return subset_of(
        dataclasses.replace(scan, skipped=(*scan.skipped, *bad.found)),
        texts,
        resolution=resolution,
        repeats=repeats,
        pictures=pictures,
        captions=captions,
        masks=masks,
        on_bad_file=on_bad_file,
        index_folder=index_folder,
        on_progress=on_progress,
        told=(*told, *warnings),
        name=root.name,
    )


def subset_of(
    scan: Scan,
    texts: Sequence[tuple[str, ...]],
    *,
    name: str,
    resolution: Resolution,
    repeats: int = 1,
    pictures: PictureSettings = DEFAULT_PICTURES,
    captions: CaptionSettings = DEFAULT_CAPTIONS,
    masks: str | Path | None = None,
    on_bad_file: OnBadFile = "stop",
    index_folder: Path | None = None,
    on_progress: OnProgress | None = None,
    told: Sequence[str] = (),
) -> Subset:
    """The pictures of a scan with their captions as they are written; the rest as `image_folder`.

    Raises:
        ValueError: a picture cannot be read, a mask is missing or no mask of its picture, or all
            pictures are bad.
    """
    hashes = ContentHashes.in_folder(index_folder)
    contents = hashes.of_all(scan.pictures, on_progress).digests
    found: Sequence[Mask | str | None] = [None] * len(contents)
    if masks == ALPHA:
        found = alpha_masks(scan.pictures, contents)
    elif masks:
        found = folder_masks(scan.pictures, masks, scan.folder, index_folder, hashes, on_progress)
    wrong = (mask for mask in found if isinstance(mask, str))
    left_out = [*(sentence for _, sentence in scan.skipped), *wrong]
    require(on_bad_file == "skip" or not left_out, "".join(left_out[:1]))
    records = make_records(
        scan.pictures, texts, contents, found, captions=captions, repeats=repeats
    )
    require(bool(records), "".join(left_out[:1]))
    return Subset(
        records=records,
        resolution=resolution,
        name=name,
        pictures=pictures,
        captions=captions,
        on_bad_file=on_bad_file,
        told=(*_told(scan.pictures), *told, *(f"Left out: {text}" for text in left_out)),
    )


def make_records(
    pictures: Sequence[Picture],
    written: Sequence[Sequence[str]],
    contents: Sequence[str],
    masks: Sequence[Mask | str | None],
    *,
    captions: CaptionSettings,
    repeats: int,
) -> tuple[Record, ...]:
    """Records of pictures, their captions as they are written, and the hashes of their bytes; a
    picture without a caption, or whose mask is a sentence that says what is wrong, is left out."""
    return tuple(
        Record(
            path=picture.path,
            texts=tuple(caption_variants(caption, captions, _SEED, content) for caption in some),
            content=content,
            width=picture.width,
            height=picture.height,
            mask=mask,
            repeats=repeats,
        )
        for picture, some, content, mask in zip(pictures, written, contents, masks, strict=True)
        if some and not isinstance(mask, str)
    )


def _told(pictures: Sequence[Picture]) -> Iterator[str]:
    """What the headers say of pictures that do not train as a viewer shows them."""
    animated = [Path(picture.path).name for picture in pictures if picture.num_frames > 1]
    profiles = [Path(picture.path).name for picture in pictures if picture.has_unusable_profile]
    if animated:
        yield f"Animated pictures, of which only the first frame is trained: {listed(animated)}."
    if profiles:
        yield (
            "Pictures whose colour profile is broken or for another kind of picture, and is "
            f"ignored: {listed(profiles)}."
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


def _require_some(
    pictures: Sequence[object], folder: str | Path, *, recursive: bool = False
) -> None:
    kinds = ", ".join(extension[1:] for extension in PICTURE_EXTENSIONS)
    require(
        bool(pictures) or not recursive,
        f"The folder {folder} and its subfolders hold no pictures ({kinds}). Put some into it.",
    )
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
    return decode(_read(record.path, record.content), record.path)


def open_mask(mask: Mask) -> Image.Image:
    """The decoded mask of a record. Raises ValueError as `open_picture`."""
    return mask_image(mask, _read(mask.path, mask.content))


def mask_weights(mask: Mask, how: Transform) -> Tensor:
    """Weights [h, w] in 0..1 of the latents of the picture that `how` transforms.

    Raises:
        ValueError: as `open_picture`.
    """
    return latent_weights(open_mask(mask), how)


def _read(path: str, content: str) -> bytes:
    data = read_bytes(path)
    require(
        hashlib.sha256(data).hexdigest() == content,
        f"The picture {path} changed after the dataset was read. Queue the graph again.",
    )
    return data


def _file_name(record: Record) -> str:
    return Path(record.path).name
