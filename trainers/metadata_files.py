"""metadata.jsonl, .csv and .parquet: captions of a folder in one file.

The convention is that of Hugging Face's ImageFolder: one entry per picture, with its path below the
folder in the column `file_name` and its caption in another. Only these two columns are read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from .config import require
from .packages import importing

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
CAPTION_COLUMNS = ("text", "caption")
"""Where captions are when no column is named; the first that is there."""


def find_metadata(folder: Path) -> Path | None:
    """The metadata file of a folder, or None.

    Raises:
        ValueError: if there are several, since they may differ.
    """
    found = [name for name in METADATA_FILES if (folder / name).is_file()]
    require(
        len(found) < 2,
        f"The folder {folder} holds {' and '.join(found)}. Keep only one of them.",
    )
    return folder / found[0] if found else None


def read_metadata(path: Path, column: str = "") -> dict[str, tuple[str, ...]]:
    """{path of a picture below the folder, with slashes: its captions}, in the order of the file.

    An entry may hold one text, a list of texts, or null for none. With an empty `column`, it is
    that of CAPTION_COLUMNS.

    Raises:
        ValueError: if the file or an entry of it is not as it should be. The message names the
            line; in a parquet file that is the number of the row.
    """
    wanted = (column,) if column else CAPTION_COLUMNS
    rows = {".jsonl": _json_rows, ".csv": _csv_rows}.get(path.suffix)
    entries: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for line, row in rows(path) if rows else _parquet_rows(path, wanted):
        name = _picture_name(row[_first_column(row, (FILE_NAME,), path, line)], path, line)
        require(
            name not in entries,
            f"Line {line} of {path} names the picture {name} again, after line {lines.get(name)}. "
            "Keep one of the two; several captions of a picture are a list of texts in one entry.",
        )
        entries[name] = _texts(row, _first_column(row, wanted, path, line), path, line)
        lines[name] = line
    return entries


def is_text(value: Any) -> bool:
    """Whether it is a string that a text encoder and a UTF-8 file can take."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def _first_column(columns: Collection[str], wanted: tuple[str, ...], path: Path, line: int) -> str:
    for column in wanted:
        if column in columns:
            return column
    raise ValueError(
        f"Line {line} of {path} has no column {' or '.join(wanted)}. "
        f"Its columns: {', '.join(columns) or '-'}."
    )


def _picture_name(value: Any, path: Path, line: int) -> str:
    """ "./a\\b.png" as "a/b.png"."""
    parts = value.replace("\\", "/").split("/") if is_text(value) else []
    name = "/".join(part for part in parts if part not in ("", "."))
    inside = name and parts[0] and ".." not in parts and not re.match("[A-Za-z]:[/\\\\]", value)
    require(
        bool(inside),
        f"Line {line} of {path} has the file_name {value!r}. It must be the path of a picture "
        "below the folder of that file, such as cat.png or cats/cat.png.",
    )
    return name


def _texts(row: Mapping[str, Any], column: str, path: Path, line: int) -> tuple[str, ...]:
    value = row[column]
    texts = [] if value is None else value if isinstance(value, list) else [value]
    require(
        all(is_text(text) for text in texts),
        f"Line {line} of {path} has {value!r:.80} in the column {column}. Write a text there, or a "
        "list of texts.",
    )
    return one_or_more(texts) if texts else ()


def one_or_more(texts: list[str]) -> tuple[str, ...]:
    """The texts without the space around them and without empty ones; if all are, one of those."""
    return tuple(text.strip() for text in texts if text.strip()) or ("",)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): a text may hold a U+2028 as it is.
    for line, text in enumerate(_read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"Line {line} of {path} is not a JSON object. Every line must be one, with "
                "file_name and text."
            )
        yield line, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            if header and cells:
                require(
                    len(cells) == len(header),
                    f"Line {line} of {path} has {len(cells)} values for {len(header)} columns. Put "
                    "texts that contain commas into double quotes.",
                )
                yield line, dict(zip(header, cells, strict=True))
            header = header or cells
            line = reader.line_num + 1  # an entry may span several lines: this is its first
    except csv.Error as error:
        raise ValueError(f"Line {line} of {path} is not valid CSV: {error}.") from error


def _parquet_rows(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with importing("pyarrow"):
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    try:
        # Not read_table: it makes columns of folders that are named a=b.
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [_first_column(names, choices, path, 1) for choices in ((FILE_NAME,), wanted)]
            table = file.read(columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"The file {path} cannot be read as parquet: it is damaged or another kind of file. "
            "Write it again, or write metadata.jsonl in its place."
        ) from error
    try:
        yield from enumerate(table.to_pylist(), 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {path} holds text that is not UTF-8.") from error


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"Cannot read the file {path}: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
        broken_at = data.find(b"\0")  # UTF-16 without a mark decodes as UTF-8 and is full of NULs
    except UnicodeDecodeError as error:
        text, broken_at = "", error.start
    line = data.count(b"\n", 0, max(broken_at, 0)) + 1
    require(broken_at < 0, f"Line {line} of {path} is not UTF-8 text. Save the file as UTF-8.")
    return text
