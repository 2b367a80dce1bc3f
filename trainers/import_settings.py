"""Settings of other trainers' dataset files: read, checked, and which of them were not used.

What a setting of theirs means here is in the modules `import_kohya` and so on.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .buckets import STEP, STEPS, Resolution
from .captions import CaptionSettings
from .checks import require
from .config import ALWAYS, Schedule
from .dataset import DEFAULT_CAPTIONS, DEFAULT_PICTURES, PictureSettings
from .files import not_read
from .scan import Picture

CONFIG_EXTENSIONS = (".toml", ".yaml", ".yml", ".json")
_MAX_BYTES = 1 << 20
"""Of a configuration. YAML is read at a few MB a second."""
_MAX_NUMBER = 1 << 24

ANY_ASPECT = 100.0
"""The `max_aspect` of datasets that do not limit the shapes of their pictures."""

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "a section of settings",
}

UNKNOWN = "{0}: this setting is not known here."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Which pictures of a folder are trained. Sizes are those after the EXIF rotation."""

    min_side: float = 0.0
    """Pixels of the shorter side."""
    min_area: float = 0.0
    """Pixels."""
    min_aspect: float = 0.0
    """Width over height."""
    max_aspect: float = float("inf")
    """Width over height."""

    def allow(self, picture: Picture) -> bool:
        width, height = picture.width, picture.height
        is_large = min(width, height) >= self.min_side and width * height >= self.min_area
        return is_large and self.min_aspect <= width / height <= self.max_aspect


@dataclass(frozen=True, kw_only=True)
class FolderPlan:
    """A folder of pictures, and how it is trained: one subset for each resolution."""

    folder: Path
    resolutions: tuple[Resolution, ...]
    repeats: int = 1
    pictures: PictureSettings = DEFAULT_PICTURES
    captions: CaptionSettings = DEFAULT_CAPTIONS
    masks: str | Path | None = None
    """As `image_folder` takes it."""
    references: Path | None = None
    """Of the pictures that a Kontext is shown."""
    schedule: Schedule = ALWAYS
    """Its probability is for each picture of it, in proportion to those of other folders."""
    is_regularization: bool = False
    is_prior: bool = False
    recursive: bool = False
    limits: Limits | None = None
    table: Path | None = None
    """The file of `written`."""
    written: Mapping[str, tuple[str, ...]] | None = None
    """Captions by the names of the pictures, if a table has them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration asks for."""

    tool: str
    """Its trainer, as a user knows it."""
    folders: tuple[FolderPlan, ...]
    notes: tuple[str, ...]
    """A sentence for each reason why settings have no counterpart here, with all of them."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the folders and files may lie that a configuration names."""

    config: Path
    """The configuration itself."""
    roots: tuple[Path, ...]
    """Only what is below one of them is read."""

    def folder(self, name: str) -> Path:
        """The folder of this name: an absolute path, or one below the configuration or a root.

        Raises:
            ValueError: it is outside of the roots, or not there.
        """
        for path in self._candidates(name):
            if path.is_dir():
                return path
        raise ValueError(
            f"The folder {name!r}, which {self.config.name} names, is not there. Put it beside "
            f"that file or below {self.roots[0]}, and write its path below it into the file."
        )

    def file(self, name: str) -> Path:
        """As `folder`."""
        for path in self._candidates(name):
            if path.is_file():
                return path
        raise ValueError(
            f"The file {name!r}, which {self.config.name} names, is not there. Put it beside that "
            f"file or below {self.roots[0]}, and write its path below it into the file."
        )

    def _candidates(self, name: str) -> list[Path]:
        """Paths below the roots, links followed, that the name may mean."""
        slashes = name.replace("\\", "/")
        is_absolute = slashes.startswith(("/", "~")) or re.match("[A-Za-z]:", slashes)
        if is_absolute:
            paths = [Path(name)] if Path(name).is_absolute() else []
        else:
            paths = [
                parent / PurePosixPath(slashes) for parent in (self.config.parent, *self.roots)
            ]
        # Nothing outside is looked at, not even whether it is there.
        inside = [path for path in paths if self._is_inside(Path(os.path.normpath(path)))]
        inside = [path.resolve() for path in inside]
        allowed = [path for path in inside if self._is_inside(path)]
        require(
            bool(allowed) and "\0" not in name,
            f"{name!r}, which {self.config.name} names, lies outside of the folders that may be "
            "read. Move it below input/ and write its path below it into the file, or have the "
            "administrator add its folder to atelier_datasets in extra_model_paths.yaml.",
        )
        return allowed

    def _is_inside(self, path: Path) -> bool:
        roots = (*self.roots, *(root.resolve() for root in self.roots))
        return any(path.is_relative_to(root) for root in roots)


class Notes:
    """Reasons and the settings they hold for, in the order of their appearance."""

    def __init__(self) -> None:
        self._settings: dict[str, dict[str, None]] = {}

    def add(self, reason: str, setting: str) -> None:
        """`reason` is a sentence with {0} for the setting."""
        self._settings.setdefault(reason, {})[setting] = None

    def sentences(self) -> tuple[str, ...]:
        return tuple(
            reason.format("; ".join(settings)) for reason, settings in self._settings.items()
        )


class Settings:
    """The settings of one part of a configuration. What it has not, it takes from its parent."""

    def __init__(
        self, file: Path, place: str, values: Any, notes: Notes, parent: Settings | None = None
    ) -> None:
        """`place` is the part's name for users.

        Raises:
            ValueError: the values are no section of settings.
        """
        self.place = place
        self._file, self._notes, self._parent = file, notes, parent
        self._values: dict[Any, Any] = self._checked(place, values, dict)
        self._used: set[Any] = set()

    def flag(self, name: str, default: bool = False) -> bool:
        return self._take(name, bool, default)

    def text(self, name: str, default: str = "") -> str:
        return self._take(name, str, default)

    def count(self, name: str, default: int = 0) -> int:
        return self._take(name, int, default)

    def number(self, name: str, default: float = 0.0) -> float:
        return float(self._take(name, float, default))

    def items(self, name: str) -> list[Any]:
        return self._take(name, list, [])

    def value(self, name: str) -> Any:
        """Whatever stands there, or None."""
        return self._take(name, object, None)

    def section(self, name: str) -> Settings:
        """The settings of a part of this part."""
        values = self._take(name, dict, {})
        return Settings(self._file, f"{self.place}, {name}", values, self._notes)

    def note(self, reason: str, name: str) -> None:
        """Say that the setting is not taken over, or not as it is."""
        self._notes.add(reason, self.shown(name))

    def shown(self, name: str) -> str:
        """The setting with its value and place."""
        return f"{name} = {_short(self._find(name))} ({self.place})"

    def note_unused(self, reasons: Mapping[str, tuple[Any, str]]) -> None:
        """Note what nothing asked for. `reasons` has the value that means nothing, and why the
        setting is not taken over."""
        for name, value in self._values.items():
            if name in self._used:
                continue
            meaningless, reason = reasons.get(name, (_NOTHING, UNKNOWN))
            if value is not None and (type(value), value) != (type(meaningless), meaningless):
                self.note(reason, str(name))

    def fail(self, name: str, expected: str) -> ValueError:
        """What is wrong with the value of a setting."""
        return ValueError(
            f"The setting {name} ({self.place}) in {self._file} must be {expected}, got "
            f"{_short(self._find(name))}."
        )

    def _find(self, name: str) -> Any:
        if self._values.get(name) is None and self._parent:
            return self._parent._find(name)
        return self._values.get(name)

    def _take(self, name: str, kind: type, default: Any) -> Any:
        part: Settings | None = self
        while part:
            part._used.add(name)
            part = part._parent
        value = self._find(name)
        return default if value is None else self._checked(name, value, kind)

    def _checked(self, name: str, value: Any, kind: type) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = is_number if kind is float else isinstance(value, kind)
        if kind in (int, float):
            fits = fits and is_number and abs(value) <= _MAX_NUMBER
        if not fits:
            raise ValueError(
                f"The setting {name} ({self.place}) in {self._file} must be {KINDS[kind]}, got "
                f"{_short(value)}."
            )
        return value


_NOTHING = object()


def read_config(path: Path) -> Any:
    """The values of a TOML, YAML or JSON file. Nothing in it is executed.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    try:
        size = path.stat().st_size
        require(
            size <= _MAX_BYTES,
            f"The file {path} has {size} bytes, and a configuration at most {_MAX_BYTES}. Choose "
            "the dataset configuration itself.",
        )
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise not_read(path, error) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {path} is not UTF-8 text. Save it as UTF-8.") from error
    kind = path.suffix[1:].upper()
    try:
        return _PARSERS[path.suffix.lower()](text)
    except KeyError as error:
        raise ValueError(f"The file {path} is not TOML, YAML or JSON by its name.") from error
    except RecursionError as error:
        raise ValueError(f"The file {path} is nested too deeply for a configuration.") from error
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"The file {path} is not valid {kind}: {reason:.200}.") from error


def _parse_toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    return tomllib.loads(text)


def _parse_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


_PARSERS = {
    ".toml": _parse_toml,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".json": json.loads,
}


def sized(settings: Settings, name: str, size: tuple[float, float], *, step: int) -> Resolution:
    """A resolution of that (width, height) in pixels, which the setting `name` gave.

    Sides are rounded to 16 pixels, and the step is 16, where 64 does not divide them.
    """
    width, height = (STEP * round(side / STEP) for side in size)
    if not all(64 <= side <= 8192 for side in (width, height)):
        raise settings.fail(name, "a size of 64 to 8192 pixels")
    if any(abs(exact - side) > 1 for exact, side in zip(size, (width, height), strict=True)):
        settings.note("{0}: sides are multiples of 16 pixels, so the nearest is taken.", name)
    coarse = step >= STEPS[1] and width % STEPS[1] == 0 and height % STEPS[1] == 0
    return Resolution(width=width, height=height, step=STEPS[1] if coarse else STEP)


def sections(
    values: Any, place: str, file: Path, notes: Notes, parent: Settings | None = None
) -> Iterator[Settings]:
    """The parts of a list, named by their number, and by their parent if there is one.

    Raises:
        ValueError: it is no list, or holds something else than sections.
    """
    require(
        isinstance(values, list),
        f"The {place} of {file} must be a list, got {_short(values)}.",
    )
    for number, part in enumerate(values, 1):
        yield Settings(file, f"{place} {number}", part, notes, parent)


def _short(value: Any) -> str:
    # A YAML file of a few lines can hold lists of lists of lists with billions of items.
    shown = _SHORT.repr(value)
    return shown if len(shown) <= 120 else f"{shown[:120]}…"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = 80
