"""A folder of pictures, read into the records of a subset: captions, masks and hashes of each.

Headers are read and bytes hashed; no pixels are decoded.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .buckets import Resolution
from .caption_variants import caption_variants
from .captions import CaptionSettings, given_captions, listed, read_captions
from .checks import require
from .content_hashes import ContentHashes
from .dataset import DEFAULT_CAPTIONS, DEFAULT_PICTURES, Record, Subset
from .masks import ALPHA, Mask, alpha_masks, folder_masks
from .pictures import PictureSettings
from .progress import OnProgress
from .references import Reference, folder_references
from .scan import PICTURE_EXTENSIONS, BadFiles, OnBadFile, Picture, Scan, scan_folder

_SEED = 0
"""Of the orders of shuffled tags: they are encoded once, whatever the seed of a training."""


def image_folder(
    path: str | Path,
    *,
    resolution: Resolution,
    repeats: int = 1,
    pictures: PictureSettings = DEFAULT_PICTURES,
    captions: CaptionSettings = DEFAULT_CAPTIONS,
    masks: str | Path | None = None,
    references: str | Path | None = None,
    on_bad_file: OnBadFile = "stop",
    index_folder: Path | None = None,
    on_progress: OnProgress | None = None,
    recursive: bool = False,
    written: Mapping[str, tuple[str, ...]] | None = None,
    keep: Callable[[Picture], bool] | None = None,
) -> Subset:
    """The pictures of one folder, sorted by name, each with its captions.

    `masks` is a folder of masks, or `masks.ALPHA` for the transparency of the pictures;
    `references` a folder of pictures that a Kontext is shown beside them. Headers are read and
    bytes hashed here, once for each version of a file if `index_folder` is
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
        scan, told = _kept(scan, keep)
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
        references=references,
        on_bad_file=on_bad_file,
        index_folder=index_folder,
        on_progress=on_progress,
        told=(*told, *warnings),
        name=root.name,
    )


def _kept(scan: Scan, keep: Callable[[Picture], bool]) -> tuple[Scan, list[str]]:
    """The pictures for which `keep` is true, and what is told of the others."""
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
    return dataclasses.replace(scan, pictures=tuple(kept)), told


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
    references: str | Path | None = None,
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
    shown: Sequence[Reference | str | None] = [None] * len(contents)
    if references:
        shown = folder_references(
            scan.pictures,
            references,
            scan.folder,
            index_folder=index_folder,
            hashes=hashes,
            on_progress=on_progress,
        )
    wrong = (one for one in (*found, *shown) if isinstance(one, str))
    left_out = [*(sentence for _, sentence in scan.skipped), *wrong]
    require(on_bad_file == "skip" or not left_out, "".join(left_out[:1]))
    records = make_records(
        scan.pictures, texts, contents, found, shown, captions=captions, repeats=repeats
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
    references: Sequence[Reference | str | None],
    *,
    captions: CaptionSettings,
    repeats: int,
) -> tuple[Record, ...]:
    """Records of pictures, their captions as they are written, and the hashes of their bytes; a
    picture without a caption, or whose mask or reference is a sentence that says what is wrong, is
    left out."""
    return tuple(
        Record(
            path=picture.path,
            texts=tuple(caption_variants(caption, captions, _SEED, content) for caption in some),
            content=content,
            width=picture.width,
            height=picture.height,
            mask=mask,
            reference=reference,
            repeats=repeats,
        )
        for picture, some, content, mask, reference in zip(
            pictures, written, contents, masks, references, strict=True
        )
        if some and not isinstance(mask, str) and not isinstance(reference, str)
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
