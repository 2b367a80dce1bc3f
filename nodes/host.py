"""The host's facts: progress, interruption, memory, inference mode, differences of versions."""

from __future__ import annotations

import atexit
import dataclasses
import inspect
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import comfyui_version
import torch
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from PIL import Image

logger = logging.getLogger("atelier")


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
