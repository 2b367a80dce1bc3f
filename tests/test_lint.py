"""ruff and pyright find nothing; their settings are in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["__init__.py", "nodes", "trainers", "scripts", "tests", "assets", "benchmarks"]


def run_tool(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    return done.stdout if done.returncode else ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_ruff_finds_nothing(folder: str) -> None:
    assert not run_tool("ruff", "check", "--output-format=concise", folder)


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_formatter_changes_nothing(folder: str) -> None:
    assert not run_tool("ruff", "format", "--check", folder)


@pytest.mark.slow
def test_pyright_finds_nothing_in_trainers() -> None:
    assert not run_tool("pyright")
