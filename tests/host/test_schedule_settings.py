"""Schedule Settings in ComfyUI's own executor, in this process."""

import re
from pathlib import Path
from typing import Any

import executor
import folder_paths
import numpy as np
import pytest
import torch
from atelier.nodes.schedule_settings import ScheduleSettings
from atelier.trainers.flow_settings import (
    FlowSettings,
    LossSettings,
    RolloutSettings,
    TimestepSettings,
)
from atelier.trainers.timestep_picture import timestep_picture
from executor import Runner

DEFAULTS = {one.id: one.default for one in ScheduleSettings.GET_SCHEMA().inputs}
ALL_SET = {
    **{"sampling": "custom", "shift": 2.0, "logit_mean": 0.5, "logit_std": 2.0, "mode_scale": 1.0},
    **{"sigmoid_scale": 3.0, "beta_alpha": 4.0, "beta_beta": 5.0, "custom": "1, 0.25"},
    **{"loss": "huber", "huber_c": 0.2, "huber_schedule": "snr", "weight": "bell"},
    **{"noise_offset": 0.05, "guidance_max": 4.0, "rollout": 6, "rollout_probability": 0.8},
    **{"rollout_start": 0.1, "rollout_ramp_steps": 70, "rollout_ramp": "cosine"},
    **{"rollout_offsets": "early"},
}
EXPECTED = FlowSettings(
    timesteps=TimestepSettings(
        sampling="custom",
        shift=2.0,
        logit_mean=0.5,
        logit_std=2.0,
        mode_scale=1.0,
        sigmoid_scale=3.0,
        beta_alpha=4.0,
        beta_beta=5.0,
        custom=(1.0, 0.25),
    ),
    loss=LossSettings(loss="huber", huber_c=0.2, huber_schedule="snr", weight="bell"),
    noise_offset=0.05,
    guidance_max=4.0,
    rollout=RolloutSettings(
        max_offset=6,
        offsets="early",
        probability=0.8,
        start_probability=0.1,
        ramp_steps=70,
        ramp="cosine",
    ),
)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    import nodes

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "AtelierScheduleSettings", ScheduleSettings)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Keep", executor.Keep)
    return Runner()


def graph(output: int, **inputs: Any) -> dict[str, Any]:
    values = {**DEFAULTS, **inputs}
    return {
        "schedule": {"class_type": "AtelierScheduleSettings", "inputs": values},
        "keep": {"class_type": "Keep", "inputs": {"value": ["schedule", output]}},
    }


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({}, FlowSettings()),
        (ALL_SET, EXPECTED),
        ({"bypass_guidance": True}, FlowSettings(bypass_guidance=True)),
        ({"auto_shift": True}, FlowSettings(timesteps=TimestepSettings(auto_shift=True))),
    ],
    ids=["defaults", "all", "bypass", "auto"],
)
def test_the_widgets_are_the_settings(
    runner: Runner, inputs: dict[str, Any], expected: FlowSettings
) -> None:
    assert runner.run(graph(0, **inputs)) == expected


def test_the_picture_is_an_output_and_lies_on_the_node(runner: Runner, tmp_path: Path) -> None:
    image = runner.run(graph(1, sampling="flux_shift", width=512, height=768))
    settings = FlowSettings(timesteps=TimestepSettings(sampling="flux_shift"))
    expected = np.asarray(timestep_picture(settings, width=512, height=768))
    assert (image.dtype, image.shape) == (torch.float32, (1, *expected.shape))
    assert np.array_equal((image[0].numpy() * 255).round(), expected)
    (shown,) = runner.images["schedule"]
    assert (tmp_path / shown["filename"]).is_file()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"sampling": "custom"}, "needs a list, such as"),
        ({"sampling": "custom", "custom": "1, b"}, "numbers with commas, .* got '1, b'"),
        ({"shift": 3.0, "auto_shift": True}, "There are two timestep shifts: 3.0"),
        ({"guidance_max": 4.0, "bypass_guidance": True}, "bypassed and drawn up to 4.0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_graph_runs(
    inputs: dict[str, Any], message: str
) -> None:
    found = ScheduleSettings.validate_inputs(**{**DEFAULTS, **inputs})
    assert re.search(message, str(found))


def test_a_linked_input_is_not_judged() -> None:
    assert ScheduleSettings.validate_inputs(**{**DEFAULTS, "sampling": None}) is True
    assert ScheduleSettings.validate_inputs(**DEFAULTS) is True
