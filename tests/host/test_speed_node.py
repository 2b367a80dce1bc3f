"""Speed Settings says what has no effect."""

from __future__ import annotations

from typing import Any

import executor
import pytest
from atelier.nodes import host
from atelier.nodes.speed_settings import SpeedSettingsNode
from atelier.trainers.speed_settings import SpeedSettings, TreadRoute
from executor import Runner

DEFAULTS = {one.id: one.default for one in SpeedSettingsNode.GET_SCHEMA().inputs}


def test_ends_of_a_route_without_tokens_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import nodes

    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "AtelierSpeedSettings", SpeedSettingsNode)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Keep", executor.Keep)
    shown: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, _: shown.append(text))

    def run(**inputs: Any) -> SpeedSettings:
        speed = {"class_type": "AtelierSpeedSettings", "inputs": {**DEFAULTS, **inputs}}
        keep = {"class_type": "Keep", "inputs": {"value": ["speed", 0]}}
        return Runner().run({"speed": speed, "keep": keep})

    assert run() == SpeedSettings()
    assert run(tread_start=4).tread == ()
    route = TreadRoute(selection_ratio=0.5, start_layer=4, end_layer=-3)
    assert run(tread_ratio=0.5, tread_start=4, tread_end=-3).tread == (route,)
    assert shown == ["", "The setting tread_start has no effect: tread_ratio is 0.", ""]
