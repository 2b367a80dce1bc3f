"""ComfyUI's modules in this process, with its arguments for a CPU."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path


def make_comfy_importable(comfyui: Path, base: str) -> None:
    """Let this process import `comfy` of a checkout; its own folders lie below `base`."""
    sys.path.append(str(comfyui))
    with contextlib.suppress(ImportError):  # what main.py of newer versions does first
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.options

    comfy.options.enable_args_parsing()
    arguments, sys.argv = sys.argv, ["main.py", "--cpu", "--base-directory", base]
    import comfy.cli_args  # reads sys.argv, once

    sys.argv = arguments
    # ComfyUI's `nodes` puts the folder comfy/ on the path, whose utils.py would hide this package.
    importlib.import_module("utils")
