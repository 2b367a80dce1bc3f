"""Which encoder a loader node gives, remembered on disk, so that a full cache needs no loader.

A cache is keyed by its encoder's weights, which are unknown until the loader has run. Some loaders
give an encoder that depends on nothing but named files and constants. For these the
identity is remembered under the loader's inputs, its files (path, size, times of change), ComfyUI's
version and dtypes. Any other source (a LoRA in between, a linked name, another pack) is not
remembered: then the loader runs, and its weights tell.

A file that changed after ComfyUI started is not remembered either: ComfyUI keeps what a loader
gave, so the encoder in memory may still be that of the file's former content.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..trainers.caches import digest
from ..trainers.files import write_atomically
from . import folders, host

_FILE_INPUTS = {
    "VAELoader": {"vae_name": "vae"},
    "CheckpointLoaderSimple": {"ckpt_name": "checkpoints"},
    "DualCLIPLoader": {"clip_name1": "text_encoders", "clip_name2": "text_encoders"},
    "AtelierLoadQuantizedTextEncoders": {"clip_l": "text_encoders", "t5xxl": "text_encoders"},
}
"""Loader class to its inputs that name files, and ComfyUI's kind of folder for each."""

_STARTED_NS = time.time_ns()  # ComfyUI imports packs before any loader runs


class LoaderMemory:
    """The identity of the encoder at one input of the node that runs."""

    def __init__(self, hidden: Any, input_name: str, folder: Path) -> None:
        dynprompt, node_id = getattr(hidden, "dynprompt", None), getattr(hidden, "unique_id", "")
        source = _source(dynprompt, node_id, input_name)
        self._file = folder / "loaders" / source if source else None

    def recall(self) -> str:
        """The encoder's identity, or "" when it is not known."""
        if self._file is None or not self._file.is_file():
            return ""
        return self._file.read_text(encoding="utf-8")

    def remember(self, encoder_id: str) -> None:
        if self._file is not None and self.recall() != encoder_id:
            # What a disk does not take is found again by running the loader.
            with suppress(ValueError):
                write_atomically(
                    self._file, lambda path: path.write_text(encoder_id, encoding="utf-8")
                )


def _source(dynprompt: Any, node_id: str, input_name: str) -> str:
    """Hash of everything that determines the linked output, or "" when that cannot be known."""
    if dynprompt is None:  # the node was called outside a graph
        return ""
    link = dynprompt.get_node(node_id)["inputs"].get(input_name)
    if not isinstance(link, list):
        return ""
    loader = dynprompt.get_node(link[0])
    files = _files(loader["class_type"], loader["inputs"])
    if not files:
        return ""
    facts = (host.version(), host.encoder_dtypes(), loader["class_type"], loader["inputs"], link[1])
    return digest([facts, files])


def _files(class_type: str, inputs: dict[str, Any]) -> list[tuple[str, int, int, int]]:
    """Path, size and times of the loader's files; none when they do not tell what it gives."""
    kinds = _FILE_INPUTS.get(class_type, {})
    if any(isinstance(value, list) for value in inputs.values()):
        return []
    paths = [folders.model_file(kind, inputs[name]) for name, kind in kinds.items()]
    if None in paths:
        return []
    stats = [(str(path), path.stat()) for path in paths]
    if any(max(stat.st_mtime_ns, stat.st_ctime_ns) >= _STARTED_NS for _, stat in stats):
        return []
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]
