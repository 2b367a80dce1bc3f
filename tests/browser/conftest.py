"""A headless Chromium for tests: which one, and the Node package that drives it.

Without Chromium, Node or the package index the browser tests are skipped with one line; where
ATELIER_CI is set (.ci/run sets it) they fail instead.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = ROOT / ".dev" / "browser"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.browser)


def unavailable(reason: str) -> None:
    (pytest.fail if os.environ.get("ATELIER_CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The executable: ATELIER_CHROMIUM, or the first known name on the PATH."""
    named = os.environ.get("ATELIER_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if found is None:
        unavailable("no Chromium is installed: install it, or name it in ATELIER_CHROMIUM")
    return Path(found)


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """A node_modules folder that holds playwright-core, installed once under .dev."""
    npm = shutil.which("npm")
    if npm is None:
        unavailable("npm is not installed, so playwright-core cannot be installed")
    package = Path(__file__).parent / "package.json"
    installed = MODULES / "package.json"
    same = installed.exists() and installed.read_bytes() == package.read_bytes()
    if not (same and (MODULES / "node_modules" / "playwright-core").is_dir()):
        MODULES.mkdir(parents=True, exist_ok=True)
        shutil.copy(package, installed)
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(MODULES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            installed.unlink()
            unavailable(f"npm could not install playwright-core: {done.stderr.strip()[-300:]}")
    return MODULES / "node_modules"
