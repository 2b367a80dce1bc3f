"""In what two runs differ, in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .run_identity import RunIdentity

_NAMES = {
    "base": "the base model",
    "base_format": "the base model's format",
    "latents": "the pictures",
    "prompts": "the captions or their encoder",
    "frozen_loras": "the LoRAs on the MODEL",
    "assistant_loras": "the assistant",
    "num_steps": "the length, which the learning rate follows",
    "version": "the version of run folders",
}
_HASHES = ("base", "latents", "prompts", "frozen_loras", "assistant_loras")
"""Values that say that something differs, and not in what."""


def different_run(folder: Path, wanted: RunIdentity, manifest: dict[str, Any]) -> str:
    """Why the run in `folder` is not the one that is wanted, as a sentence for a user.

    Args:
        manifest: the job of the wanted run, as its job.json would have it.
    """
    if not (folder / "run.json").is_file():
        return (
            f"There is no run {folder.name} any more. Set resume to automatic to train a run of "
            "its own, or press R and choose another."
        )
    try:
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        found = "; ".join(_differences(saved, wanted.to_json(), job, manifest))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return (
            f"The run {folder.name} cannot be read: {error}. Set resume to automatic to train a "
            "run of its own."
        )
    if not found:
        return (
            f"The folder of the run {folder.name} was renamed or copied: a run is found by its "
            "name and the code behind it. Give it back its name, or set resume to automatic."
        )
    return (
        f"The run {folder.name} was trained differently: {found}. Set it back to go on with that "
        f"run, or set resume to automatic to train a run of its own beside it."
    )


def _differences(
    saved: dict[str, Any], wanted: dict[str, Any], job: dict[str, Any], manifest: dict[str, Any]
) -> Iterator[str]:
    before, now = _leaves(saved), _leaves(wanted)
    for name in sorted(before.keys() | now.keys()):
        was, is_now = before.get(name, "the default"), now.get(name, "the default")
        if was == is_now:
            continue
        if name == "latents":
            yield f"{_NAMES[name]}{_pictures(job, manifest)}"
        elif name == "base":
            yield f"{_NAMES[name]}{_files(job, manifest)}"
        elif name in _HASHES:
            yield _NAMES[name]
        else:
            yield f"{_NAMES.get(name, name)} (there {was}, here {is_now})"


def _leaves(values: dict[str, Any]) -> dict[str, Any]:
    """The values without their groups, and without an alpha that only follows the rank."""
    leaves = _flat(values)
    if leaves["alpha"] == leaves["rank"]:
        leaves["alpha"] = "that of rank"
    return leaves


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    leaves = {}
    for name, value in values.items():
        leaves |= _flat(value) if isinstance(value, dict) else {name: value}
    return leaves


def _files(job: dict[str, Any], manifest: dict[str, Any]) -> str:
    there, here = (Path(one["model"]).name or "another" for one in (job, manifest))
    return f" (there {there}, here {'another of that name' if there == here else here})"


def _pictures(job: dict[str, Any], manifest: dict[str, Any]) -> str:
    if "subsets" not in job["latents"]:  # of an older version
        return ""
    before, now = _records(job), _records(manifest)
    if before == now:
        return " (the same ones in other sizes, numbers, masks or another encoding)"
    return f" (there {len(before)}, here {len(now)}, {len(before & now)} of them the same)"


def _records(manifest: dict[str, Any]) -> set[str]:
    subsets = manifest["latents"]["subsets"]
    return {entry["record"] for subset in subsets for entry in subset["entries"]}
