"""Makes the pack importable as `atelier`, for every benchmark."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_pack() -> None:
    """Load it as ComfyUI does, whatever its folder is called; also open tests/support."""
    spec = importlib.util.spec_from_file_location("atelier", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["atelier"] = pack
    spec.loader.exec_module(pack)
    sys.path.append(str(ROOT / "tests" / "support"))
