"""A real ComfyUI and its frontend in a headless Chromium.

Without Chromium, Node or the package index the browser tests are skipped with one line; where
ATELIER_CI is set (.ci/run sets it) they fail instead.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import ComfyServer

sys.path.append(str(Path(__file__).parent))
from frontend import ROOT, WORKFLOWS, Frontend, Unavailable

MODEL_FILE = re.compile(r'"([\w.-]+\.safetensors)"')
COMFYUI = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def browser_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI whose settings and open workflows belong to the browser tests.

    The models that the workflows name are empty files: newer pages mark nodes whose file is missing
    as faulty, and draw them larger.
    """
    base = tmp_path_factory.mktemp("comfyui-browser")
    for name in {
        name for path in WORKFLOWS for name in MODEL_FILE.findall(path.read_text("utf-8"))
    }:
        for kind in ("diffusion_models", "text_encoders", "vae"):
            (base / "models" / kind).mkdir(parents=True, exist_ok=True)
            (base / "models" / kind / name).touch()
    with ComfyServer(COMFYUI, base, arguments=("--cpu",)) as running:
        yield running


@pytest.fixture(scope="session")
def frontend(browser_server: ComfyServer) -> Iterator[Frontend]:
    try:
        started = Frontend(browser_server)
    except Unavailable as reason:
        (pytest.fail if os.environ.get("ATELIER_CI") else pytest.skip)(str(reason))
    with started:
        yield started
