"""Datasets in the forms that the Hugging Face Hub and DiffSynth-Studio use, local or on the hub.

- parquet files with the pictures inside: columns image {bytes, path} and text
- pictures with metadata.jsonl, .json, .csv or .parquet, or with text files, also in subfolders
- the folders images/ and prompts/ with files of the same names
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .buckets import Resolution
from .captions import CaptionSettings, captions_in_folder, filled_in, name_as_caption
from .checks import require
from .dataset import PictureSettings, Subset
from .files import write_json
from .hub import refusals, require_hub_id, snapshot
from .image_folder import image_folder, subset_of
from .metadata_files import (
    CAPTION_COLUMNS,
    METADATA_FILES,
    first_column,
    is_text,
    row_texts,
)
from .packages import importing
from .picture_files import PictureFiles
from .progress import OnProgress, throttled
from .scan import PICTURE_EXTENSIONS, OnBadFile, Picture, scan_files

_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
_ROWS_AT_ONCE = 16
_OTHER_SPLITS = {"test", "validation", "valid", "val", "dev", "eval", "evaluation"}
"""Words in the paths of what is not for training, as the hub's own rule has them."""


def fetch_dataset(
    hub_id: str,
    index_folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """A dataset repository in the hub's own cache: its parquet files, else its pictures, metadata
    and captions, of the training split.

    What was downloaded whole is taken without network. `index_folder` is for our own file that
    says so. `on_progress` is called before each file; what it raises ends the download.

    Raises:
        ValueError: the id is none, the repository is not there, is gated or holds no such files,
            or the hub or the disk refuses.
    """
    from huggingface_hub import HfApi, hf_hub_download

    require_hub_id(hub_id)
    index = index_folder / f"hub_{hub_id.replace('/', '--')}.json"
    if is_fetched(hub_id, index_folder):
        return snapshot(hub_id, "dataset")
    with refusals(hub_id, "dataset"):
        names = _needed(hub_id, HfApi().list_repo_files(hub_id, repo_type="dataset"))
        for done, name in enumerate(names):
            on_progress(done, len(names))
            hf_hub_download(hub_id, name, repo_type="dataset")
        place = snapshot(hub_id, "dataset")
    write_json(index, {"commit": place.name, "files": names})
    return place


def is_fetched(hub_id: str, index_folder: Path) -> bool:
    """Whether all that is needed of a dataset repository is in the hub's cache."""
    index = index_folder / f"hub_{hub_id.replace('/', '--')}.json"
    try:
        facts: Any = json.loads(index.read_bytes())
        place = snapshot(hub_id, "dataset")
        return place.name == facts["commit"] and all((place / f).is_file() for f in facts["files"])
    except (OSError, ValueError, LookupError, TypeError):
        return False


def hub_folder(
    folder: Path,
    *,
    files: PictureFiles,
    resolution: Resolution,
    repeats: int,
    pictures: PictureSettings,
    captions: CaptionSettings,
    on_bad_file: OnBadFile,
    index_folder: Path | None,
    on_progress: OnProgress | None = None,
) -> Subset:
    """A folder in one of the forms of this module. Pictures inside of parquet files are kept
    in `files`.

    Captions come from the metadata where `captions` would take text files. The rest is as
    `image_folder` has it.

    Raises:
        ValueError: as `image_folder`, or a parquet file is not as it should be.
    """
    settings: dict[str, Any] = {"resolution": resolution, "repeats": repeats, "pictures": pictures}
    settings |= {"on_bad_file": on_bad_file, "index_folder": index_folder}
    settings |= {"on_progress": on_progress}
    require(folder.is_dir(), f"The picture folder {folder} does not exist. Check its name.")
    if (folder / "images").is_dir() and (folder / "prompts").is_dir():
        written = captions_in_folder(folder / "prompts", captions)
        is_table = captions.source == "text file"
        return image_folder(
            folder / "images",
            captions=captions,
            written=written if is_table else None,
            **settings,
        )
    tables = _of_training_split(
        [p for p in sorted(folder.rglob("*.parquet")) if p.name not in METADATA_FILES], folder
    )
    if tables:
        return _parquet_subset(tables, folder, captions, files, settings)
    if captions.source == "text file" and any(_metadata_files(folder)):
        captions = _from_metadata(captions)
    folders = {path.parent for path in _picture_paths(folder)}
    kept = {str(path) for path in _of_training_split(sorted(folders), folder)}

    def keep(picture: Picture) -> bool:
        return str(Path(picture.path).parent) in kept

    return image_folder(folder, captions=captions, recursive=True, keep=keep, **settings)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One picture of a parquet file."""

    place: str
    """The file and the number of the row, as messages name it."""
    data: bytes | None
    name: str
    """Its file name, if the row has one."""
    texts: tuple[str, ...]


def _parquet_subset(
    tables: list[Path],
    folder: Path,
    captions: CaptionSettings,
    files: PictureFiles,
    settings: dict[str, Any],
) -> Subset:
    on_bad_file: OnBadFile = settings["on_bad_file"]
    report = throttled(settings["on_progress"])
    wants_column = captions.source in ("text file", "metadata file")
    told: list[str] = []
    paths: list[str] = []
    texts: list[tuple[str, ...]] = []
    for done, table in enumerate(tables):
        for row in _rows(table, captions.column, wants_column=wants_column):
            report(done, len(tables))
            caption = _caption(row, captions)
            try:
                require(row.data is not None, f"{row.place} has no bytes of a picture. Remove it.")
                path = files.keep_bytes(row.data or b"", row.place)
            except ValueError as error:
                if on_bad_file == "stop" or isinstance(error.__cause__, OSError):
                    raise
                told.append(f"Left out: {error}")
                continue
            paths.append(str(path))
            texts.append(caption)
    require(bool(paths), f"The parquet files of {folder} hold no pictures. Choose another folder.")
    scan = scan_files(paths, files.folder, on_bad_file=on_bad_file)
    good = {picture.path for picture in scan.pictures}
    kept = [text for path, text in zip(paths, texts, strict=True) if path in good]
    return subset_of(
        scan, kept, name=folder.name, captions=_from_metadata(captions), told=told, **settings
    )


def _rows(path: Path, column: str, *, wants_column: bool) -> Iterator[_Row]:
    """Row groups are read one at a time."""
    with importing("pyarrow"):
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    wanted = (column,) if column else CAPTION_COLUMNS
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            image = first_column(names, _IMAGE_COLUMNS, path, 1)
            caption = first_column(names, wanted, path, 1) if wants_column else None
            columns = [image, caption] if caption else [image]
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    value = row[image]
                    value = value if isinstance(value, dict) else {"bytes": value}
                    data, name = value.get("bytes"), value.get("path")
                    yield _Row(
                        place=f"{path}:{line}",
                        data=data if isinstance(data, bytes) else None,
                        name=Path(str(name)).name if is_text(name) else "",
                        texts=row_texts(row, caption, path, line) if caption else (),
                    )
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"The file {path} cannot be read as parquet: it is damaged or another kind of file. "
            "Download or write it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {path} holds text that is not UTF-8.") from error


def _caption(row: _Row, captions: CaptionSettings) -> tuple[str, ...]:
    if captions.source == "instance prompt":
        return (captions.instance_prompt.strip(),)
    if captions.source == "file name":
        return (name_as_caption(Path(row.name)),)
    require(
        bool(row.texts) or captions.may_be_missing,
        f"{row.place} has no caption. Write one, or let missing captions be the file name or "
        "empty.",
    )
    return row.texts or (filled_in(Path(row.name), captions),)


def _from_metadata(captions: CaptionSettings) -> CaptionSettings:
    if captions.source != "text file":
        return captions
    return dataclasses.replace(captions, source="metadata file")


def _needed(hub_id: str, names: Iterable[str]) -> list[str]:
    """Those of a repository's files that are read here.

    Raises:
        ValueError: there are none.
    """
    names = sorted(name for name in names if not Path(name).name.startswith("."))
    last = {name: name.rpartition("/")[2] for name in names}
    parquet = [n for n in names if n.endswith(".parquet") and last[n] not in METADATA_FILES]
    pictures = [n for n in names if n.lower().endswith(PICTURE_EXTENSIONS)]
    require(
        bool(parquet or pictures),
        f"The repository '{hub_id}' holds neither parquet files nor pictures. Download it, and "
        "make a folder of pictures of it.",
    )
    texts = [n for n in names if n.endswith(".txt") or last[n] in METADATA_FILES]
    chosen = parquet or [*pictures, *texts]
    trained = [n for n in chosen if not _is_other_split(n if parquet else n.rpartition("/")[0])]
    return trained or chosen


def _of_training_split(paths: list[Path], root: Path) -> list[Path]:
    """Parquet files or folders without those of a test split; all if that leaves none."""
    trained = [p for p in paths if not _is_other_split(p.relative_to(root).as_posix())]
    return trained or paths


def _is_other_split(path: str) -> bool:
    return not _OTHER_SPLITS.isdisjoint(re.split("[^a-z]+", path.lower()))


def _metadata_files(folder: Path) -> Iterator[Path]:
    return (path for name in METADATA_FILES for path in folder.rglob(name))


def _picture_paths(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_EXTENSIONS)
