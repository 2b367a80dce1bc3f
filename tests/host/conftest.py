"""ComfyUI for tests: a real headless server, and `comfy` importable in this process.

The ComfyUI is named by ATELIER_COMFYUI (dev.py does so), else it is the one under .dev.
"""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from comfy_in_process import make_comfy_importable
from comfy_server import ComfyServer

ROOT = Path(__file__).resolve().parent.parent.parent
COMFYUI = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
IN_PROCESS_BASE = tempfile.TemporaryDirectory(prefix="atelier-")

if not (COMFYUI / "main.py").is_file():
    raise pytest.UsageError(
        f"The host tests need a ComfyUI, but {COMFYUI} holds none. "
        "Run `python scripts/dev.py test`, or set ATELIER_COMFYUI to its folder."
    )

make_comfy_importable(COMFYUI, IN_PROCESS_BASE.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.host)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI on the CPU with this pack: `server.run(graph)` returns what came out."""
    with running(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture
def server_without_caches(tmp_path: Path) -> Iterator[ComfyServer]:
    """One that forgets what nodes gave as soon as the nodes after them have it."""
    with running(tmp_path, "--cache-none") as server:
        yield server


@contextmanager
def running(base: Path, *arguments: str) -> Iterator[ComfyServer]:
    def end_tests(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, end_tests)
    try:
        with ComfyServer(COMFYUI, base, arguments=("--cpu", *arguments)) as server:
            yield server
    finally:
        signal.signal(signal.SIGTERM, previous)
