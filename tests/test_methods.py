"""docs/methods.md: the table is that of the last measurement, and no kind of method is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers.flow_settings import LOSS_WEIGHTS, LOSSES, TIMESTEP_SAMPLING
from atelier.trainers.formats import FORMATS
from atelier.trainers.lora_settings import INITS, KINDS
from atelier.trainers.optimizer_settings import LR_SCHEDULES, OPTIMIZERS
from pack import load_module

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
method_list: Any = load_module("method_list", BENCHMARKS / "method_list.py")
methods_page: Any = load_module("methods_page", BENCHMARKS / "methods_page.py")
LEFT_OUT = {"fast", "custom", "shift", "balanced"}
"""Timesteps of schnell, of a list or a number of the user's, and another name of uniform."""
EVERY = {
    "kind": KINDS,
    "init": INITS,
    "optimizer": OPTIMIZERS,
    "schedule": LR_SCHEDULES,
    "sampling": [name for name in TIMESTEP_SAMPLING if name not in LEFT_OUT],
    "loss": LOSSES,
    "weight": LOSS_WEIGHTS,
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads((BENCHMARKS / "results" / "methods.json").read_text(encoding="utf-8"))


def test_the_page_shows_what_was_measured(measured: dict[str, Any]) -> None:
    page = methods_page.PAGE.read_text(encoding="utf-8")
    assert methods_page.with_table(page, measured) == page
    assert "| the default |" in page


def fields(settings: Any) -> dict[str, Any]:
    """All fields of settings and of the settings in them."""
    found: dict[str, Any] = {}
    for name, value in vars(settings).items():
        found |= {name: value} if not hasattr(value, "__dataclass_fields__") else fields(value)
    return found


@pytest.mark.parametrize("name", EVERY)
def test_every_choice_is_measured(measured: dict[str, Any], name: str) -> None:
    rows = [method for method in method_list.rows() if method.key in measured["rows"]]
    assert set(EVERY[name]) <= {fields(method.job)[name] for method in rows}


def test_every_format_is_measured(measured: dict[str, Any]) -> None:
    rows = [method for method in method_list.rows() if method.key in measured["rows"]]
    assert set(FORMATS) == {method.format for method in rows}
