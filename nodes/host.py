"""The host's facts: folders, progress, interruption, inference mode, differences of versions."""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import comfy.model_management
import comfy.utils
import comfyui_version
import folder_paths
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

from ..trainers.run import run_name
from ..trainers.scan import PICTURE_EXTENSIONS
from ..trainers.status import read_status

logger = logging.getLogger("atelier")

DATASET_ROOTS_KEY = "atelier_datasets"
"""Key of extra_model_paths.yaml: folders besides input/ whose subfolders may be trained on."""


def atelier_output() -> Path:
    """Where caches and runs lie: output/atelier."""
    return Path(folder_paths.get_output_directory()) / "atelier"


def run_ids() -> list[str]:
    """The folders of all runs, the last one first."""
    times = {}
    for file in atelier_output().glob("*/run.json"):
        with suppress(FileNotFoundError):  # deleted meanwhile
            times[file.parent.name] = file.stat().st_mtime
    return sorted(times, key=times.__getitem__, reverse=True)


def runs_that_went_on(name: str) -> list[tuple[str, str | None]]:
    """Id and LoRA file of the runs called `name` that were stopped and kept, and then resumed."""
    ids = [run_id for run_id in run_ids() if run_name(run_id) == name]
    found = {run_id: read_status(atelier_output() / run_id) for run_id in ids}
    return [(run_id, status.lora) for run_id, status in found.items() if status and status.went_on]


def cache_folder(kind: str) -> Path:
    """The folder of one kind of cache: `latents`, `prompts`, or what is known of `files`. It may
    not exist yet."""
    return atelier_output() / "cache" / kind


def dataset_roots() -> list[Path]:
    """input/, then the folders that the administrator added."""
    added = folder_paths.folder_names_and_paths.get(DATASET_ROOTS_KEY, ([],))[0]
    return [Path(folder_paths.get_input_directory()), *map(Path, added)]


def dataset_folders() -> list[str]:
    """Names of all folders below the dataset roots that hold pictures, with forward slashes."""
    names = set()
    for root in dataset_roots():
        for folder, _, files in os.walk(root):
            has_picture = any(name.lower().endswith(PICTURE_EXTENSIONS) for name in files)
            if has_picture and folder != str(root):
                names.add(Path(folder).relative_to(root).as_posix())
    return sorted(names)


def dataset_trees(extensions: tuple[str, ...]) -> list[str]:
    """Names of all folders below the dataset roots that hold, also deeper, files that end so."""
    parents = (PurePosixPath(name).parents for name in dataset_files(extensions))
    return sorted({str(folder) for folders in parents for folder in folders} - {"."})


def dataset_files(extensions: tuple[str, ...]) -> list[str]:
    """Names of all files below the dataset roots that end so, with forward slashes."""
    names = set()
    for root in dataset_roots():
        for folder, _, files in os.walk(root):
            found = (name for name in files if name.lower().endswith(extensions))
            names |= {Path(folder, name).relative_to(root).as_posix() for name in found}
    return sorted(names)


def dataset_file(name: str) -> Path:
    """The file called `name` below a dataset root.

    Raises:
        ValueError: there is none, or the name or a link leads out of the root.
    """
    path = _path_below(name)
    for root in dataset_roots() if path else []:
        file = root.joinpath(path)
        if file.is_file() and file.resolve().is_relative_to(root.resolve()):
            return file
    raise ValueError(
        f"The file {name!r} is not below {dataset_roots()[0]}. Put it there, or press R and choose "
        "another."
    )


def dataset_folder(name: str) -> Path:
    """The folder called `name` below a dataset root.

    Raises:
        ValueError: there is none, or the name or a link leads out of the root.
    """
    if not name:
        raise ValueError("No picture folder is chosen. Make one below input/ and put pictures in.")
    path = _path_below(name)
    if path is None:
        raise ValueError(
            f"The picture folder must lie below input/, got {name!r}. Choose one from the list."
        )
    for root in dataset_roots():
        folder = root.joinpath(path)
        if folder.is_dir():
            if not folder.resolve().is_relative_to(root.resolve()):
                raise ValueError(
                    f"The picture folder {name!r} is a link that leads out of {root}. Put the "
                    "pictures themselves there."
                )
            return folder
    raise ValueError(
        f"The picture folder {name!r} is not below {dataset_roots()[0]}. Put it there, or press R "
        "and choose another."
    )


def fingerprints(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of those of the files that are there."""
    stats = [(path, path.stat()) for path in files if path.is_file()]
    return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _path_below(name: str) -> PurePosixPath | None:
    """A path, with slashes of either kind, if it leads down and nowhere else."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts or path.is_absolute() or ":" in name or ".." in path.parts:
        return None
    return path


def model_file(kind: str, name: str) -> Path | None:
    """The file that ComfyUI's own loaders open for `name`, or None."""
    path = folder_paths.get_full_path(kind, name)
    return Path(path) if path else None


def model_names(kind: str) -> list[str]:
    """The names that ComfyUI lists for a kind of model, such as `diffusion_models`."""
    if kind not in folder_paths.folder_names_and_paths:
        return []
    return folder_paths.get_filename_list(kind)


def files_called(name: str) -> list[Path]:
    """The files of any kind of model that ComfyUI's loaders would open for `name`."""
    found = (model_file(kind, name) for kind in folder_paths.folder_names_and_paths)
    return sorted({path for path in found if path})


def embedding_folders() -> list[str]:
    """Where textual inversions lie."""
    return folder_paths.get_folder_paths("embeddings")


def diffusers_folders() -> dict[str, Path]:
    """Folders in diffusers' layout below models/diffusers, by name."""
    roots = [Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    folders = [folder for root in roots if root.is_dir() for folder in sorted(root.iterdir())]
    return {folder.name: folder for folder in folders if (folder / "transformer").is_dir()}


def version() -> str:
    """ComfyUI's version, such as 0.3.75."""
    return comfyui_version.__version__


def encoder_dtypes() -> str:
    """The dtypes in which this start of ComfyUI loads autoencoders and text encoders."""
    management = comfy.model_management
    autoencoder = management.vae_dtype(management.vae_device(), [torch.bfloat16, torch.float32])
    return f"{autoencoder} {management.text_encoder_dtype(management.text_encoder_device())}"


def check_interrupted() -> None:
    """Raise ComfyUI's interruption when the user pressed Cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


_PROGRESS_S = 0.1
"""Between two moves of a bar: each is two messages to the page."""
_PREVIEW_PX = 512
"""Longer side of the picture on a node while it runs, as of ComfyUI's samplers."""


class Progress:
    """The bar of the node that runs now, moved at most ten times a second."""

    def __init__(self, total: int = 1) -> None:
        self._bar = comfy.utils.ProgressBar(total)
        self._shown = 0.0

    def update(self, done: int, total: int, preview: Image.Image | None = None) -> None:
        """Show the progress, and a picture on the node. Raises ComfyUI's interruption when the user
        pressed Cancel."""
        check_interrupted()
        self.show(done, total, preview)

    def show(self, done: int, total: int, preview: Image.Image | None = None) -> None:
        """Show the progress of work that looks for an interruption itself."""
        now = time.monotonic()
        if now - self._shown < _PROGRESS_S and done < total:
            return
        self._shown = now
        shown = None if preview is None else ("JPEG", preview, _PREVIEW_PX)
        self._bar.update_absolute(done, total, shown)


def show_text(text: str, node_id: str) -> None:
    """Show a line of text on a node while it runs, in every open browser."""
    server = prompt_server()
    if server is not None:
        server.send_progress_text(text, node_id)


def send_event(name: str, data: dict[str, Any]) -> None:
    """Send a message to every open page; from any thread."""
    server = prompt_server()
    if server is not None:
        server.send_sync(name, data)


def report(node_id: str, message: str, *warnings: str) -> dict[str, list[str]]:
    """Text for the node's face and, as its `ui` output, the history; warnings go to the log too."""
    for warning in warnings:
        logger.warning(warning)
    show_text("\n".join([message, *warnings]), node_id)
    return {"text": [message, *warnings]}


def prompt_server() -> Any:
    """ComfyUI's server, or None: its executor also runs without."""
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


def add_route(method: str, path: str, handler: Callable[[Any], Any]) -> None:
    """Let ComfyUI's server, where there is one, answer requests to `path` by `handler`."""
    server = prompt_server()
    if server is not None:
        server.routes.route(method, path)(handler)


def is_busy() -> bool:
    """Whether a graph runs or waits in the queue."""
    server = prompt_server()
    return server is not None and server.prompt_queue.get_tasks_remaining() > 0


def blocked_output(message: str) -> Any:
    """A value for an output that has nothing to give: only a node that wants it stops, with
    `message`."""
    return ExecutionBlocker(message)


def is_deterministic() -> bool:
    """Whether the same computation gives the same bits: on a CPU, or with --deterministic."""
    return compute_device().type == "cpu" or torch.are_deterministic_algorithms_enabled()


def compute_device() -> torch.device:
    """Where ComfyUI computes."""
    return comfy.model_management.get_torch_device()


def offload_device() -> torch.device:
    """Where ComfyUI keeps a network that does not compute."""
    return comfy.model_management.unet_offload_device()


def free_memory() -> int:
    """Bytes of the compute device that are free, or held by models that ComfyUI can evict."""
    management, device = comfy.model_management, compute_device()
    evictable = sum(
        entry.model_loaded_memory()
        for entry in management.current_loaded_models
        if entry.model is not None and entry.device == device and device.type != "cpu"
    )
    return management.get_free_memory(device) + evictable


def free_system_memory() -> int:
    """Bytes of RAM that are free."""
    return comfy.model_management.get_free_memory(torch.device("cpu"))


def is_cancel(error: BaseException) -> bool:
    """Whether it is ComfyUI's interruption, or the server's end."""
    interruption = comfy.model_management.InterruptProcessingException
    return isinstance(error, (interruption, KeyboardInterrupt))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device ran out of memory."""
    management = comfy.model_management
    if hasattr(management, "is_oom"):  # from 2026 on
        return management.is_oom(error)
    return isinstance(error, management.OOM_EXCEPTION)


def free_device_memory() -> None:
    """Give up what is loaded on the device, after it ran out of memory."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def lora_folder() -> Path:
    """Where LoRAs are written: output/loras, which every LoRA loader lists."""
    folder = Path(folder_paths.get_output_directory()) / "loras"
    if str(folder) not in folder_paths.get_folder_paths("loras"):
        folder_paths.add_model_folder_path("loras", str(folder))
    return folder


def numbered_file(prefix: str, extension: str) -> Path:
    """A new file of the output folder, named as ComfyUI's saving nodes do: the prefix and the next
    number.

    Raises:
        ValueError: if the prefix leads out of the output folder.
    """
    if _path_below(prefix) is None:
        raise ValueError(
            f"The file name must lie below the output folder, got {prefix!r}. Use a name such as "
            "'diffusion_models/my_model'."
        )
    folder, name, number, *_ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{number:05}_{extension}"


@contextmanager
def ended_before_exit(seconds: float = 30.0) -> Iterator[None]:
    """While this runs, a server that exits asks the work inside to stop, and waits for it.

    ComfyUI's worker is a daemon thread: an exit would end it without unwinding. ComfyUI does not
    handle SIGTERM, by which services and containers are stopped: here it does what Ctrl-C does.
    """
    ended = threading.Event()

    def stop_and_wait() -> None:
        comfy.model_management.interrupt_current_processing()
        ended.wait(seconds)

    atexit.register(stop_and_wait)
    _replace_sigterm(signal.SIG_DFL, signal.default_int_handler)
    try:
        yield
    finally:
        ended.set()
        atexit.unregister(stop_and_wait)
        _replace_sigterm(signal.default_int_handler, signal.SIG_DFL)


def _replace_sigterm(old: Any, new: Any) -> None:
    """Handle SIGTERM by `new` if it is handled by `old`; somebody else's handler is kept."""

    def replace() -> None:
        if signal.getsignal(signal.SIGTERM) == old:
            signal.signal(signal.SIGTERM, new)

    server = prompt_server()
    if server is not None:  # only the main thread may do it, which runs the server's loop
        server.loop.call_soon_threadsafe(replace)


@contextmanager
def training_mode() -> Iterator[None]:
    """Leave the inference mode in which ComfyUI runs nodes, and record gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def schema(**fields: Any) -> io.Schema:
    """An `io.Schema`, without the fields that the running ComfyUI does not know yet."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})


def make_input(kind: Any, name: str, **options: Any) -> Any:
    """`kind.Input(name, ...)`, without the options that the running ComfyUI does not know yet."""
    known = inspect.signature(kind.Input).parameters
    return kind.Input(name, **{key: value for key, value in options.items() if key in known})
