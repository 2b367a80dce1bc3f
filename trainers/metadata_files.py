"""metadata.jsonl, .csv and .parquet: captions of a folder in one file.

The convention is that of Hugging Face's ImageFolder: one entry per picture, with its path below the
folder in the column `file_name` and its caption in another. Only these two columns are read.
DiffSynth-Studio's convention is the same with other names of columns, and also has metadata.json.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checks import require
from .files import read_bytes
from .packages import importing

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json")
FILE_NAMES = ("file_name", "image")
"""Where the path of a picture is: in Hugging Face's files, and in DiffSynth-Studio's."""
CAPTION_COLUMNS = ("text", "caption", "prompt")
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
    entries: dict[str, tuple[str, ...]] = {}
    lines: dict[str, int] = {}
    for line, row in read_table(path, (FILE_NAMES, wanted)):
        name = _picture_name(row[first_column(row, FILE_NAMES, path, line)], path, line)
        require(
            name not in entries,
            f"Line {line} of {path} names the picture {name} again, after line {lines.get(name)}. "
            "Keep one of the two; several captions of a picture are a list of texts in one entry.",
        )
        entries[name] = row_texts(row, first_column(row, wanted, path, line), path, line)
        lines[name] = line
    return entries


def read_table(
    path: Path, columns: Sequence[tuple[str, ...]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each line or row of a .jsonl, .json, .csv or .parquet file, and what it holds.

    Of each of `columns` a parquet file must have one or several, and only they are read. A .json
    file is a list of objects.

    Raises:
        ValueError: if the file or a line of it is not as it should be.
    """
    rows = {".jsonl": _json_lines, ".json": _json_objects, ".csv": _csv_rows}.get(path.suffix)
    return rows(path) if rows else _parquet_rows(path, columns)


def is_text(value: Any) -> bool:
    """Whether it is a string that a text encoder and a UTF-8 file can take."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def first_column(columns: Collection[str], wanted: tuple[str, ...], path: Path, line: int) -> str:
    """The first of the wanted columns that is there.

    Raises:
        ValueError: there is none.
    """
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


def row_texts(row: Mapping[str, Any], column: str, path: Path, line: int) -> tuple[str, ...]:
    """The captions in a column of a line; none if it holds null.

    Raises:
        ValueError: it holds something else than a text or a list of texts.
    """
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


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        if "UTF-8" in str(error):
            raise
        rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"The file {path} is not a list of JSON objects. Every picture must be one, with its "
            "path and its caption."
        )
    yield from enumerate(rows, 1)


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _parquet_rows(
    path: Path, columns: Sequence[tuple[str, ...]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    with importing("pyarrow"):
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    try:
        # Not read_table: it makes columns of folders that are named a=b.
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for choices in columns:
                first_column(names, choices, path, 1)
            wanted = {name for choices in columns for name in choices}
            table = file.read(columns=[name for name in names if name in wanted])
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
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
        broken_at = data.find(b"\0")  # UTF-16 without a mark decodes as UTF-8 and is full of NULs
    except UnicodeDecodeError as error:
        text, broken_at = "", error.start
    line = data.count(b"\n", 0, max(broken_at, 0)) + 1
    require(broken_at < 0, f"Line {line} of {path} is not UTF-8 text. Save the file as UTF-8.")
    return text
