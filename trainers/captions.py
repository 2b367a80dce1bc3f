"""Where captions come from: files beside pictures, names, one prompt, metadata files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .checks import require
from .files import not_read
from .metadata_files import METADATA_FILES, find_metadata, is_text, one_or_more, read_metadata

CaptionSource = Literal["text file", "file name", "instance prompt", "metadata file"]
CAPTION_SOURCES: tuple[CaptionSource, ...] = (
    "text file",
    "file name",
    "instance prompt",
    "metadata file",
)
MissingCaptions = Literal["error", "file name", "empty"]
MISSING_CAPTIONS: tuple[MissingCaptions, ...] = ("error", "file name", "empty")
CaptionLines = Literal["one", "each", "first"]
CAPTION_LINES: tuple[CaptionLines, ...] = ("one", "each", "first")

OnBad = Callable[[str, ValueError], None]
"""Called with the path of a picture and what is wrong with its caption. It may raise to stop."""

TRIGGER_MARK = "[trigger]"
"""Stands for the trigger word in captions that are made for ai-toolkit."""


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    source: CaptionSource = "text file"
    """A text file beside each picture (cat.txt of cat.png), the name of the picture with spaces for
    underscores, one prompt for all, or metadata.jsonl, .csv, .parquet or .json in the folder."""
    instance_prompt: str = ""
    """The caption of all pictures, for that source."""
    column: str = ""
    """The column of a metadata file that holds the captions; empty takes `text`, else `caption`,
    else `prompt`."""
    lines: CaptionLines = "one"
    """Whether a text file is one caption, each of its lines is one, or only its first line is."""
    missing: MissingCaptions = "error"
    """What a picture without a caption does: stop, take the file name, or train without a text."""
    trigger: str = ""
    """A word that calls up what is learned: put in place of [trigger], and before captions without
    it, as their first tag."""
    prefix: str = ""
    """Text before every caption, also before its trigger. It is never shuffled."""
    suffix: str = ""
    """Text after every caption. It is never shuffled."""
    separator: str = ","
    """What stands between the tags of a caption."""
    shuffle: bool = False
    """Train with the tags of a caption in several orders. For tags, not for sentences."""
    keep_tokens: int = 0
    """How many tags at the start keep their place; 1 keeps the trigger first."""
    dropout: float = 0.0
    """Share of samples, 0 to 1, that train with the empty prompt. 0.05 to 0.1 is usual."""
    variants: int = 8
    """How many orders of a caption are used. Each is encoded once: disk and time in proportion."""
    extension: str = ".txt"
    """How the names of text files end, in place of the picture's extension."""
    default: str = ""
    """The caption of pictures without one, or with an empty one; `missing` is then not asked."""

    def __post_init__(self) -> None:
        require(
            self.source in CAPTION_SOURCES,
            f"Unknown source of captions '{self.source}'. "
            f"Choose one of: {', '.join(CAPTION_SOURCES)}.",
        )
        require(
            self.source != "instance prompt" or bool(self.instance_prompt.strip()),
            "The instance prompt is empty. Write one, or choose another source of captions.",
        )
        require(
            self.lines in CAPTION_LINES,
            f"The lines of a caption file must be one of {', '.join(CAPTION_LINES)}, "
            f"got {self.lines!r}.",
        )
        require(
            self.missing in MISSING_CAPTIONS,
            f"missing_captions must be one of {', '.join(MISSING_CAPTIONS)}, got {self.missing!r}.",
        )
        require(
            self.separator != "",
            "The separator of tags is empty. A comma is usual.",
        )
        require(
            self.keep_tokens >= 0,
            f"The number of tags that keep their place must not be negative, "
            f"got {self.keep_tokens}.",
        )
        require(
            0 <= self.dropout <= 1,
            f"The caption dropout must be between 0 and 1, got {self.dropout}. 0.1 leaves out "
            "every tenth caption.",
        )
        require(
            1 <= self.variants <= 1000,
            f"The number of caption variants must be between 1 and 1000, got {self.variants}. "
            "8 is usual.",
        )
        require(
            re.fullmatch(r"\.[^/\\:\0]+", self.extension) is not None,
            "The extension of caption files must start with a dot and hold no path, such as .txt, "
            f"got {self.extension!r}.",
        )

    @property
    def may_be_missing(self) -> bool:
        """Whether a picture without a caption is no mistake."""
        return self.missing != "error" or bool(self.default)


def stop(path: str, error: ValueError) -> None:
    """What is done with a bad file unless the caller collects them."""
    raise error


def read_captions(
    pictures: Sequence[Path],
    settings: CaptionSettings,
    root: Path | None = None,
    on_bad: OnBad = stop,
) -> tuple[list[tuple[str, ...]], list[str]]:
    """The captions of each picture, one or more in the order of `pictures`, and warnings.

    Captions are as they are written: without trigger, prefix and suffix. A metadata file is looked
    for in the folder of a picture and, with `root`, in those above it up to `root`; the paths of
    `pictures` are then absolute if `root` is. A caption that is missing or is not text is given to
    `on_bad`; where that goes on, the picture has no captions.

    Raises:
        ValueError: a caption is bad and `on_bad` stops, or a metadata file is not as it should be.
    """
    if settings.source == "text file":
        captions, warnings = _from_text_files(pictures, settings, on_bad)
    elif settings.source == "file name":
        captions, warnings = _each(pictures, lambda p: (name_as_caption(p),), on_bad), []
    elif settings.source == "instance prompt":
        captions, warnings = [(settings.instance_prompt.strip(),)] * len(pictures), []
    else:
        captions, warnings = _from_metadata(pictures, settings, root, on_bad)
    return captions, [*warnings, *_unused_marks(pictures, captions, settings)]


def given_captions(
    pictures: Sequence[Path],
    written: Mapping[str, tuple[str, ...]],
    settings: CaptionSettings,
    root: Path,
    on_bad: OnBad = stop,
) -> tuple[list[tuple[str, ...]], list[str]]:
    """`read_captions` from a table in place of the source of the settings.

    `written` has the captions by the path of a picture below `root`, with slashes, with or without
    its extension.

    Raises:
        ValueError: a picture has none, the settings do not let it be missing, and `on_bad` stops.
    """

    def captions_of(picture: Path) -> tuple[str, ...]:
        path = picture.relative_to(root)
        texts = written.get(path.as_posix()) or written.get(path.with_suffix("").as_posix())
        require(
            texts is not None or settings.may_be_missing,
            f"The picture {picture} has no caption in the table or folder of captions. Add one "
            "there.",
        )
        return texts or (filled_in(picture, settings),)

    captions = _each(pictures, captions_of, on_bad)
    return captions, _unused_marks(pictures, captions, settings)


def _unused_marks(
    pictures: Sequence[Path], captions: Sequence[tuple[str, ...]], settings: CaptionSettings
) -> list[str]:
    if not settings.trigger.strip():
        marked = [
            picture.name
            for picture, texts in zip(pictures, captions, strict=True)
            if any(TRIGGER_MARK in text for text in texts)
        ]
        if marked:
            return [f"Captions hold [trigger], but there is no trigger word: {listed(marked)}."]
    return []


def listed(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _each(
    pictures: Sequence[Path], captions_of: Callable[[Path], tuple[str, ...]], on_bad: OnBad
) -> list[tuple[str, ...]]:
    """The captions of each picture, none where they are bad."""
    captions: list[tuple[str, ...]] = []
    for picture in pictures:
        try:
            captions.append(captions_of(picture))
        except ValueError as error:
            on_bad(str(picture), error)
            captions.append(())
    return captions


def _from_text_files(
    pictures: Sequence[Path], settings: CaptionSettings, on_bad: OnBad
) -> tuple[list[tuple[str, ...]], list[str]]:
    owners: dict[Path, list[str]] = {}

    def captions_of(picture: Path) -> tuple[str, ...]:
        path = picture.with_suffix(settings.extension)
        text = read_caption_file(path)
        if text is None or (settings.default and not text.strip()):
            require(
                settings.may_be_missing,
                f"The picture {picture} has no caption file {path.name}. Write one, or let missing "
                "captions be the file name or empty.",
            )
            return (filled_in(picture, settings),)
        owners.setdefault(path, []).append(picture.name)
        return one_or_more(_split(text, settings.lines))

    captions = _each(pictures, captions_of, on_bad)
    shared = [name for names in owners.values() if len(names) > 1 for name in names]
    warnings = [f"Pictures that share a caption file: {listed(shared)}."] if shared else []
    return captions, warnings


def captions_in_folder(folder: Path, settings: CaptionSettings) -> dict[str, tuple[str, ...]]:
    """The captions of all text files directly in `folder`, by their names without the extension.

    Raises:
        ValueError: a file cannot be read, or is not UTF-8.
    """
    paths = sorted(folder.glob(f"*{settings.extension}"))
    texts = {path.stem: read_caption_file(path) or "" for path in paths}
    return {name: one_or_more(_split(text, settings.lines)) for name, text in texts.items()}


def _split(text: str, lines: CaptionLines) -> list[str]:
    return [text] if lines == "one" else text.splitlines()[: 1 if lines == "first" else None]


def read_caption_file(path: Path) -> str | None:
    """The text of a file, or None if there is no such file.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise not_read(path, error) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The caption {path} is not UTF-8 text. Save it as UTF-8.") from error
    # UTF-16 without a mark decodes as UTF-8 and is full of NULs.
    require("\0" not in text, f"The caption {path} is not UTF-8 text. Save it as UTF-8.")
    return text


def _from_metadata(
    pictures: Sequence[Path], settings: CaptionSettings, root: Path | None, on_bad: OnBad
) -> tuple[list[tuple[str, ...]], list[str]]:
    files = {folder: _metadata_of(folder, root) for folder in {p.parent for p in pictures}}
    entries = {path: read_metadata(path, settings.column) for path in sorted(set(files.values()))}
    unused = {path: dict.fromkeys(names) for path, names in entries.items()}

    def captions_of(picture: Path) -> tuple[str, ...]:
        path = files[picture.parent]
        name = picture.relative_to(path.parent).as_posix()
        unused[path].pop(name, None)
        texts = entries[path].get(name)
        require(
            bool(texts) or settings.may_be_missing,
            f"The picture {picture} has no caption in {path.name}. Write one, or let missing "
            "captions be the file name or empty.",
        )
        return texts or (filled_in(picture, settings),)

    captions = _each(pictures, captions_of, on_bad)
    warnings = [
        f"Entries of {path} without a picture: {listed(list(names))}."
        for path, names in unused.items()
        if names
    ]
    return captions, warnings


def _metadata_of(folder: Path, root: Path | None) -> Path:
    last = root if root is not None and folder.is_relative_to(root) else folder
    for place in (folder, *folder.parents):
        if path := find_metadata(place):
            return path
        if place == last:
            break
    raise ValueError(
        f"The folder {folder} holds none of {', '.join(METADATA_FILES)}. Put one beside the "
        "pictures, or choose another source of captions."
    )


def filled_in(picture: Path, settings: CaptionSettings) -> str:
    """The caption of a picture that has none and may have none."""
    if settings.default:
        return settings.default.strip()
    return name_as_caption(picture) if settings.missing == "file name" else ""


def name_as_caption(picture: Path) -> str:
    """The file name with spaces for underscores.

    Raises:
        ValueError: it is no text.
    """
    require(
        is_text(picture.stem),
        f"The name of the picture {str(picture)!a} is not UTF-8 and cannot be a caption. Rename "
        "the picture.",
    )
    return picture.stem.replace("_", " ").strip()
