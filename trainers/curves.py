"""The metrics of a run as columns: what its charts show. They may be written at this moment."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "seconds", "memory", "ram")
"""What the line of an optimizer step has; those of older versions lack the last ones."""
MEASURES = ("eval_loss", "score")
"""What the line of a validation has, besides its step."""
_NUMBERS = b"0123456789+-.eE,nul"
_TAIL_BYTES = 8192
"""Enough of a file's end to hold the line of a step."""


def columns_text(path: Path, since: int = 0) -> str:
    """The columns of all steps after `since`, and all validations, as the text of JSON members.

    Numbers go from text to text: made floats and written again, 100,000 steps take twice as long.
    NaN and infinity become null, which JSON has.

    Raises:
        ValueError: if a value is no number.
    """
    lines = _lines(path)
    start = _first_after(lines, since)
    validations = [line for line in lines[:start] if '"loss"' not in line]
    rows = _rows(validations + lines[start:])
    steps = [row for row in rows if "loss" in row and int(row["step"]) > since]
    parts = [f'"{name}": [{_column(steps, name)}]' for name in COLUMNS]
    for name in MEASURES:
        found = [row for row in rows if name in row]
        columns = _column(found, "step"), _column(found, name)
        parts.append('"{}": {{"step": [{}], "value": [{}]}}'.format(name, *columns))
    return ", ".join(parts)


def last_step(path: Path) -> tuple[int, float | None] | None:
    """The last optimizer step and its loss, from the end of the file; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace")
    except OSError:
        return None
    for line in reversed(tail.split("\n")[:-1]):
        with suppress(ValueError, TypeError, LookupError):
            row = json.loads(line, parse_constant=lambda _: None)
            loss = row["loss"]
            return int(row["step"]), None if loss is None else float(loss)
    return None


def _lines(path: Path) -> list[str]:
    """The finished lines; what is written behind them at this moment is left out."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []


def _first_after(lines: list[str], step: int) -> int:
    """Index of the first line after `step`; they are in order. 0 if it cannot be told."""
    if step <= 0:
        return 0
    try:
        return bisect_right(lines, step, key=lambda line: int(json.loads(line)["step"]))
    except (ValueError, TypeError, LookupError):  # met a line that a crash cut
        return 0


def _rows(lines: list[str]) -> list[dict[str, Any]]:
    """The lines parsed, with the text of each number in its place; spoilt ones are left out."""
    try:
        rows = _parsed(f"[{','.join(lines)}]")  # at once: three times as fast as one by one
    except ValueError:
        rows = list(_whole(lines))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _whole(lines: list[str]) -> Iterator[Any]:
    for line in lines:
        with suppress(ValueError):
            yield _parsed(line)


def _parsed(text: str) -> Any:
    return json.loads(text, parse_float=str, parse_int=str, parse_constant=lambda _: None)


def _column(rows: list[dict[str, Any]], name: str) -> str:
    try:
        text = ",".join([row.get(name) or "null" for row in rows])
    except TypeError:  # a list, an object, true
        text = "?"
    if text.encode().translate(None, _NUMBERS):
        raise ValueError(f"The metrics of this run are damaged: a {name} is no number.")
    return text
