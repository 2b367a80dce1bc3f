"""Loads the pack under the name `atelier`, in the way ComfyUI loads it, before tests are collected.

Also makes the modules of scripts/ and tests/support/ importable, and fixes torch's threads.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Sums depend on the number of threads; servers that tests start inherit this. One is fastest: the
# networks are tiny, and two threads wait for each other whenever the machine has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

sys.path += [str(ROOT / "scripts"), str(ROOT / "tests" / "support")]

import pytest  # noqa: E402
from pack import load_pack  # noqa: E402

load_pack()


@pytest.fixture
def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels cannot be imported within the test, as if nothing had asked for them before."""
    from atelier.trainers.formats import bitsandbytes_functional

    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    bitsandbytes_functional.cache_clear()
