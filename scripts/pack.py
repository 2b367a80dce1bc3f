"""Modules loaded by their file, such as the pack itself, whatever its folder is called."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def load_pack() -> ModuleType:
    """The pack as `atelier`, loaded as ComfyUI does it."""
    return load_module("atelier", ROOT / "__init__.py")


def load_module(name: str, path: Path) -> ModuleType:
    """The module in a file under a name of ours, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
