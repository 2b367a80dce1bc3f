"""Dynamic thresholding against the published formulas, written again in NumPy with float64."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PATH = Path(__file__).resolve().parent.parent / "nodes" / "dynamic_threshold.py"


def load() -> Any:
    """By its path alone, as anybody may."""
    spec = importlib.util.spec_from_file_location("dynamic_threshold_alone", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


module = load()
RECIPE: dict[str, Any] = {
    "cfg_scale": 5.0,
    "mimic_scale": 2.5,
    "threshold_percentile": 1.0,
    "mimic_mode": "Half Cosine Up",
    "mimic_scale_min": 0.0,
    "cfg_mode": "Half Cosine Up",
    "cfg_scale_min": 0.0,
    "sched_val": 1.0,
    "separate_feature_channels": True,
    "scaling_startpoint": "MEAN",
    "variability_measure": "AD",
    "interpolate_phi": 0.7,
    "frac": 1.0,
}

PUBLISHED = {
    "Constant": (1, 1, 1),
    "Linear Down": (1, 0.5, 0),
    "Cosine Down": (1, 0.7071, 0.0001),
    "Half Cosine Down": (1, 0.8776, 0.5403),
    "Linear Up": (0, 0.5, 1),
    "Cosine Up": (0, 0.2929, 0.9999),
    "Half Cosine Up": (0, 0.1224, 0.4597),
    "Power Up": (0, 0.25, 1),
    "Power Down": (1, 0.75, 0),
    "Linear Repeating": (1, 1, 1),
    "Cosine Repeating": (1, 1, 1),
    "Sawtooth": (0, 0, 0),
}
"""Mode to its values at the start, the middle and the end, with a sched_val of 2."""


@pytest.mark.parametrize("mode", PUBLISHED)
def test_schedules_have_the_published_values(mode: str) -> None:
    found = [module.scheduled_scale(1.0, 0.0, mode, frac, 2.0) for frac in (0.0, 0.5, 1.0)]
    assert found == pytest.approx(PUBLISHED[mode], abs=1e-4)
    assert PUBLISHED.keys() == set(module.MODES)


@pytest.mark.parametrize(
    ("value", "power"),
    [(1.0, -0.001), (2.0, 1e-6), (2.5, 0.0)],  # -0.001 ** 2.5 is no real number
)
def test_a_place_before_the_first_step_is_no_error(value: float, power: float) -> None:
    """Where SD3 and others begin."""
    up, down = (
        module.scheduled_scale(5.0, 0.0, mode, -0.001, value) for mode in ("Power Up", "Power Down")
    )
    assert (up, down) == pytest.approx((5 * power, 5 * (1 - power)))


def test_a_minimum_is_where_the_ramp_begins() -> None:
    assert module.scheduled_scale(5.0, 2.0, "Linear Up", 0.0, 1.0) == 2.0
    assert module.scheduled_scale(2.0, 5.0, "Linear Up", 0.5, 1.0) == 3.5  # the other way


def factor(mode: str, frac: float, value: float) -> float:
    """Section 1.2 of the description, mode by mode, in an order of its own."""
    shape, _, way = mode.rpartition(" ")
    if mode in ("Constant", "Sawtooth"):
        return 1.0 if mode == "Constant" else math.fmod(frac * value, 1.0)
    if way == "Repeating":
        turn = math.fmod(frac * value, 1.0)
        return (
            abs(2 * turn - 1) if shape == "Linear" else (1 + math.cos(6.28318 * frac * value)) / 2
        )
    up = {
        "Linear": frac,
        "Cosine": 1 - math.cos(1.5707 * frac),
        "Half Cosine": 1 - math.cos(frac),
        "Power": frac**value,
    }[shape]
    return up if way == "Up" else 1 - up


def published(cond: np.ndarray, uncond: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    """Section 1.3, for one sample after the other."""

    def scale(kind: str) -> float:
        low, high = settings[f"{kind}_scale_min"], settings[f"{kind}_scale"]
        part = factor(settings[f"{kind}_mode"], settings["frac"], settings["sched_val"])
        return low + (high - low) * part

    samples = []
    for c, u in zip(cond.astype(np.float64), uncond.astype(np.float64), strict=True):
        c, u = c.reshape(len(c), -1), u.reshape(len(u), -1)
        guided, mimic = u + scale("cfg") * (c - u), u + scale("mimic") * (c - u)
        mean = guided.mean(1, keepdims=True)
        d, m = guided - mean, mimic - mimic.mean(1, keepdims=True)
        axis = 1 if settings["separate_feature_channels"] else None
        if settings["variability_measure"] == "AD":
            r_m = np.abs(m).max(axis=axis, keepdims=True)
            r_c = np.quantile(np.abs(d), settings["threshold_percentile"], axis=axis, keepdims=True)
        else:
            r_m = m.std(axis=axis, ddof=1, keepdims=True)
            r_c = d.std(axis=axis, ddof=1, keepdims=True)
        if settings["scaling_startpoint"] == "ZERO":
            result = guided * r_m / r_c
        elif settings["variability_measure"] == "STD":
            result = mean + d * r_m / r_c
        else:
            r = np.maximum(r_m, r_c)
            result = mean + np.clip(d, -r, r) * r_m / r
        phi = settings["interpolate_phi"]
        samples.append((phi * result + (1 - phi) * guided).reshape(cond.shape[1:]))
    return np.stack(samples)


def predictions(
    *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """With heavy tails, and channels of means of their own."""
    generator = torch.Generator().manual_seed(0)
    cond, uncond = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
    offset = torch.randn(shape[1], generator=generator, dtype=dtype).view(
        1, -1, *[1] * (len(shape) - 2)
    )
    return cond**3 + offset, uncond + offset / 2


KINDS = list(
    itertools.product(
        module.STARTPOINTS, module.MEASURES, (True, False), (0.0, 0.7, 1.0), (0.5, 0.98, 1.0)
    )
)


@pytest.mark.parametrize("mode", module.MODES)
@pytest.mark.parametrize("frac", [0.13, 0.5, 1.0])
def test_every_setting_gives_what_the_formulas_give(mode: str, frac: float) -> None:
    cond, uncond = predictions(1, 4, 6, 5)
    for startpoint, measure, separate, phi, percentile in KINDS:
        settings = RECIPE | {
            "cfg_mode": mode,
            "mimic_mode": mode,
            "cfg_scale_min": 1.0,
            "mimic_scale_min": 0.5,
            "sched_val": 3.0,
            "scaling_startpoint": startpoint,
            "variability_measure": measure,
            "separate_feature_channels": separate,
            "interpolate_phi": phi,
            "threshold_percentile": percentile,
            "frac": frac,
        }
        found = module.dynamic_threshold(cond, uncond, **settings)
        expected = published(cond.numpy(), uncond.numpy(), settings)
        scale = np.abs(expected).max()
        assert np.abs(found.numpy() - expected).max() <= 1e-5 * max(scale, 1), settings


@pytest.mark.parametrize("shape", [(2, 4, 30), (2, 4, 6, 5), (2, 4, 3, 6, 5)], ids=str)
@pytest.mark.parametrize("separate", [True, False])
def test_a_sample_does_not_change_another_in_its_batch(shape: tuple, separate: bool) -> None:
    cond, uncond = predictions(*shape)
    settings = RECIPE | {"separate_feature_channels": separate}
    both = module.dynamic_threshold(cond, uncond, **settings)
    alone = [
        module.dynamic_threshold(c[None], u[None], **settings)
        for c, u in zip(cond, uncond, strict=True)
    ]
    assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    cond, uncond = (tensor.to(dtype) for tensor in predictions(1, 4, 6, 5))
    found = module.dynamic_threshold(cond, uncond, **RECIPE)
    assert found.dtype == dtype
    assert torch.equal(
        found, module.dynamic_threshold(cond.float(), uncond.float(), **RECIPE).to(dtype)
    )


@pytest.mark.parametrize("startpoint", module.STARTPOINTS)
@pytest.mark.parametrize("measure", module.MEASURES)
def test_a_constant_channel_stays_what_guidance_makes_it(startpoint: str, measure: str) -> None:
    cond, uncond = predictions(1, 4, 6, 5)
    cond[:, 1], uncond[:, 1] = 2.0, 1.0
    kinds = {"scaling_startpoint": startpoint, "variability_measure": measure}
    found = module.dynamic_threshold(cond, uncond, **RECIPE | kinds)
    assert torch.isfinite(found).all()
    cfg = 5.0 * (1 - math.cos(1.0))
    assert found[0, 1].numpy() == pytest.approx(1.0 + cfg * (2.0 - 1.0), rel=1e-5)


def test_the_inputs_are_left_as_they_are() -> None:
    cond, uncond = predictions(1, 4, 6, 5)
    before = cond.clone(), uncond.clone()
    module.dynamic_threshold(cond, uncond, **RECIPE)
    assert torch.equal(cond, before[0])
    assert torch.equal(uncond, before[1])


def test_equal_scales_leave_plain_guidance_without_a_jump() -> None:
    """The original skips everything at exactly equal scales, so its pictures jump there."""
    cond, uncond = predictions(1, 4, 6, 5)
    at, near = (
        module.dynamic_threshold(cond, uncond, **RECIPE | {"cfg_scale": scale})
        for scale in (2.5, 2.5001)
    )
    assert torch.allclose(at, near, atol=1e-2)


def test_more_values_than_torch_takes_the_quantile_of() -> None:
    cond = torch.linspace(-1, 1, 2**24 + 8).view(1, 1, -1)
    with pytest.raises(RuntimeError, match="too large"):
        cond.flatten().quantile(0.99)
    settings = RECIPE | {"separate_feature_channels": False, "threshold_percentile": 0.99}
    assert torch.isfinite(module.dynamic_threshold(cond, -cond, **settings)).all()
