"""The runs on disk, as JSON values for who looks at them: a list, one in detail, its curves.

Nothing here trains, and what it reads may be written at this moment, by another version, or half
deleted. A run is found in the listing of its root folder: no path is made of what was asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .curves import columns_text, last_step
from .run import LOCK_FILE, PROMPT_FILE, RUN_FILE, run_name, steps_saved
from .status import Status, read_status

LIVE = ("training", "paused")
"""The states of a run that a process trains."""
_LORA_FOLDER = "loras"
"""Beside the root of the runs; output/loras."""
_PICTURE = re.compile(r"step-(\d{6,})-(.+)\.png")
_STATUS_FIELDS = tuple(field.name for field in fields(Status))


class UnknownRun(LookupError):
    """There is no such run; the text says so."""


def list_runs(root: Path) -> list[dict[str, Any]]:
    """A summary of each run, the one that changed last first.

    Args:
        root: the folder of all runs, `<output>/atelier`; it may not exist.
    """
    runs = []
    for folder in _folders(root):
        with suppress(FileNotFoundError):  # deleted meanwhile
            runs.append(_summary(folder, _status(folder)))
    return sorted(runs, key=lambda run: run["updated"], reverse=True)


def run_summary(root: Path, run_id: str) -> dict[str, Any]:
    """One of `list_runs`. Raises UnknownRun."""
    folder = _find(root, run_id)
    return _summary(folder, _status(folder))


def run_details(root: Path, run_id: str) -> dict[str, Any]:
    """The summary, and all that belongs to the run: files, pictures, checkpoints, settings.

    Raises:
        UnknownRun: if there is no such run.
    """
    folder = _find(root, run_id)
    status = _status(folder)
    kept = run_prompt(root, run_id)
    lora = root.parent / _LORA_FOLDER / Path(status["lora"] or "none").name
    return {
        **_summary(folder, status),
        "error": status["error"],
        "can_sample": bool(status["can_sample"]),
        "lora": _view(lora, root) if lora.is_file() else None,
        "folder": folder.relative_to(root.parent).as_posix(),
        "path": str(folder.resolve()),
        "samples": _samples(folder),
        "checkpoints": steps_saved(folder),
        "settings": kept and _settings(kept[1][kept[0]]),
        "files": _files(folder),
    }


def run_prompt(root: Path, run_id: str) -> tuple[str, dict[str, Any]] | None:
    """The id of the node that trained the run, and the graph around it in ComfyUI's API form; None
    if they were not kept, or cannot be read.

    Raises:
        UnknownRun: if there is no such run.
    """
    try:
        kept = _read_object(_find(root, run_id) / PROMPT_FILE)
    except ValueError:
        return None
    node, prompt = kept.get("node"), kept.get("prompt")
    if not isinstance(node, str) or not isinstance(prompt, dict) or node not in prompt:
        return None
    nodes = prompt.values()
    is_graph = all(isinstance(n, dict) and isinstance(n.get("inputs"), dict) for n in nodes)
    return (node, prompt) if is_graph else None


def run_metrics(root: Path, run_id: str, since: int = 0) -> str:
    """The curves of a run, its lines after the step `since`, as JSON text (curves.columns_text).

    Raises:
        UnknownRun: if there is no such run.
        ValueError: if they are damaged.
    """
    folder = _find(root, run_id)
    columns = columns_text(folder / "metrics.jsonl", since)
    return f'{{{columns}, "num_steps": {json.dumps(_status(folder)["num_steps"])}}}'


def delete_run(root: Path, run_id: str) -> int:
    """Remove a run's folder; returns the bytes that are free now.

    What makes it a run goes last, so one that could be deleted in part only is still listed.

    Raises:
        UnknownRun: if there is no such run.
        ValueError: if it is being trained, or the disk refuses.
    """
    folder = _find(root, run_id)
    freed = sum(file["bytes"] for file in _files(folder))
    try:
        with _lock(folder):
            for path in folder.iterdir():
                if path.name not in (RUN_FILE, LOCK_FILE):
                    _remove(path)
        shutil.rmtree(folder)
    except Timeout:
        raise ValueError(f"The run {run_id} is being trained. Stop it, then delete it.") from None
    except OSError as error:
        raise ValueError(
            f"Cannot delete {error.filename or folder}: {error.strerror}. See to it that this "
            "folder can be written to, and delete the run again."
        ) from error
    return freed


def _folders(root: Path) -> list[Path]:
    """The folders of runs. Caches lie beside them."""
    if not root.is_dir():
        return []
    return [
        path
        for path in root.iterdir()
        if (path / RUN_FILE).is_file() or (path / "checkpoints").is_dir()
    ]


def _find(root: Path, run_id: str) -> Path:
    for folder in _folders(root):
        if folder.name == run_id:
            return folder
    raise UnknownRun(f"There is no run {run_id!r} in {root}. Choose one of the list.")


def _status(folder: Path) -> dict[str, Any]:
    """What status.json says, put right by what else is there; `state` may be interrupted or
    damaged too."""
    steps = steps_saved(folder)
    kept = steps[-1] if steps else 0
    unknown = dict.fromkeys(_STATUS_FIELDS) | {"step": kept, "updated": 0}
    try:
        _read_object(folder / RUN_FILE)
        status = read_status(folder)
    except ValueError as error:
        return unknown | {"state": "damaged", "error": str(error)}
    if status is None:  # of an older version
        state = "training" if _is_trained(folder) else "stopped" if steps else "interrupted"
        return unknown | {"state": state}
    if status.state in LIVE and not _is_trained(folder):
        return asdict(status) | {"state": "interrupted", "step": kept}
    return asdict(status)


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"The file {path} cannot be read: {reason}. Queue the graph of this run again, or "
            "delete the run."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"The file {path} holds no JSON object. Delete this run.")
    return value


def _is_trained(folder: Path) -> bool:
    """Whether a process trains this run: it holds the lock."""
    try:
        with _lock(folder):
            return False
    except Timeout:
        return True
    except OSError:  # a disk that nobody can write to
        return False


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """Held without waiting. It is not made where there is none. Raises Timeout, OSError."""
    path = folder / LOCK_FILE
    return FileLock(path, timeout=0) if path.exists() else nullcontext()


def _summary(folder: Path, status: dict[str, Any]) -> dict[str, Any]:
    metrics = folder / "metrics.jsonl"
    step, loss = last_step(metrics) or (status["step"], None)
    written = metrics.stat().st_mtime if metrics.exists() else folder.stat().st_mtime
    pictures = _pictures(folder)
    return {
        "id": folder.name,
        "name": run_name(folder.name),
        "state": status["state"],
        "step": step if status["state"] in LIVE else status["step"],
        "num_steps": status["num_steps"],
        "loss": loss,
        "updated": max(status["updated"], written),
        "node": status["node"],
        "thumbnail": _view(pictures[-1][2], folder.parent) if pictures else None,
    }


def _pictures(folder: Path) -> list[tuple[int, str, Path]]:
    """(step, key, path) of the sample pictures, in order of their steps."""
    try:
        paths = list((folder / "samples").iterdir())
    except OSError:
        return []
    matches = ((_PICTURE.fullmatch(path.name), path) for path in paths)
    return sorted((int(match.group(1)), match.group(2), path) for match, path in matches if match)


def _samples(folder: Path) -> list[dict[str, Any]]:
    """The pictures of the strip, prompt by prompt; of a run without one, all that are there."""
    pictures = _pictures(folder)
    strip = _strip(folder / "samples" / "samples.json")
    if not strip:
        strip = [{"key": key} for key in sorted({key for _, key, _ in pictures})]
    return [
        {
            "step": step,
            **{name: sample.get(name) for name in ("key", "name", "prompt", "width", "height")},
            **_view(path, folder.parent),
        }
        for sample in strip
        for step, key, path in pictures
        if key == sample["key"]
    ]


def _strip(path: Path) -> list[dict[str, Any]]:
    try:
        strip = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    samples = strip if isinstance(strip, list) else []
    return [sample for sample in samples if isinstance(sample, dict) and "key" in sample]


def _settings(node: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a training node that are no links, without the run that it went on with: who
    copies them begins another one."""
    inputs = {name: value for name, value in node["inputs"].items() if name != "resume"}
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def _files(folder: Path) -> list[dict[str, Any]]:
    """Every file of the run with its size."""
    files = []
    for parent, _, names in os.walk(folder):  # which passes over folders that are gone meanwhile
        for path in (Path(parent, name) for name in names):
            with suppress(FileNotFoundError):
                files.append(
                    {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size}
                )
    return sorted(files, key=lambda file: file["path"])


def _view(path: Path, root: Path) -> dict[str, str]:
    """What ComfyUI's /view is asked for, to get a file of the output folder."""
    subfolder = path.parent.relative_to(root.parent).as_posix()
    return {"filename": path.name, "subfolder": subfolder, "type": "output"}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
