"""Dynamic Threshold CFG inside ComfyUI's own sampling, on a tiny FLUX."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import executor
import numpy as np
import pytest
import torch
from atelier.nodes import host
from atelier.nodes.guidance import DynamicThresholdCfg
from atelier.nodes.native import build_model
from atelier.trainers.load import load_flux
from core_models import small_sd_15
from flux_files import write_flux
from torch import Tensor
from training import CONTEXT, conditioning

SHAPE = (1, 16, 8, 8)
STEPS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    yield build_model(load_flux(path, format="bf16"), torch.float32)
    comfy.model_management.unload_all_models()
    executor.forget_networks()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: texts.append(text))
    return texts


def patched(model: Any, **changed: Any) -> Any:
    """By the node itself, with its defaults where nothing is said."""
    inputs = DynamicThresholdCfg.GET_SCHEMA().inputs
    defaults = {one.id: one.default for one in inputs if one.id != "model"}

    class Called(DynamicThresholdCfg):
        hidden = type("Hidden", (), {"unique_id": "1"})

    return Called.execute(model, **{**defaults, **changed}).args[0]


def sample(model: Any, cfg: float, sampler: str = "euler", shape: tuple = SHAPE) -> Tensor:
    empty = torch.zeros(shape)
    noise = torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in range(shape[0])])
    texts = conditioning(1), conditioning(2)
    with torch.inference_mode():
        return comfy.sample.sample(
            model, noise, STEPS, cfg, sampler, "simple", *texts, empty, disable_pbar=True, seed=0
        )


def recipe_in_numpy(args: dict[str, Any]) -> Tensor:
    """The FLUX recipe as published: on FLUX both ramps stand at 1 - cos(f), with f about 1."""
    place = (999 - float(args["sigma"][0])) / 998
    factor = 1 - math.cos(place)
    c, u = (
        args[f"{name}_denoised"].double().numpy()[0].reshape(16, -1) for name in ("cond", "uncond")
    )
    guided = u + args["cond_scale"] * factor * (c - u)
    mimic = u + 2.5 * factor * (c - u)
    mean = guided.mean(1, keepdims=True)
    d, m = guided - mean, mimic - mimic.mean(1, keepdims=True)
    r_m, r_c = np.abs(m).max(1, keepdims=True), np.abs(d).max(1, keepdims=True)
    limit = np.maximum(r_m, r_c)
    result = 0.7 * (mean + np.clip(d, -limit, limit) * r_m / limit) + 0.3 * guided
    return args["input"] - torch.from_numpy(result.reshape(SHAPE)).float()


def test_the_defaults_are_the_published_recipe_for_flux(model: Any, shown: list[str]) -> None:
    independent = model.clone()
    independent.set_model_sampler_cfg_function(recipe_in_numpy)
    ours, theirs = sample(patched(model), 5.0), sample(independent, 5.0)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, sample(model, 5.0), atol=1e-2)
    assert shown == ["CFG acts from 2.30 to 2.30, mimic from 1.15 to 1.15."]


def test_without_a_negative_prompt_nothing_changes(model: Any) -> None:
    assert torch.equal(sample(patched(model), 1.0), sample(model, 1.0))


def test_a_cfg_that_acts_below_1_is_told(model: Any, shown: list[str]) -> None:
    sample(patched(model, mimic_scale=1.0), 2.0)
    first, second = shown[0].splitlines()
    assert first == "CFG acts from 0.92 to 0.92, mimic from 0.46 to 0.46."
    assert second.startswith("The CFG that acts falls to 0.92: ")


def test_a_mimic_that_changes_nothing_is_told(model: Any, shown: list[str]) -> None:
    ours = sample(patched(model, mimic_scale=9.0, mimic_mode="Constant", cfg_mode="Constant"), 5.0)
    assert shown[0].splitlines()[1].startswith("Nothing is brought back: ")
    assert torch.allclose(ours, sample(model, 5.0), atol=1e-4)


@pytest.mark.parametrize("basis", ["steps", "sigma"])
def test_on_the_other_bases_the_scales_move_and_begin_at_1(
    model: Any, shown: list[str], basis: str
) -> None:
    sample(patched(model, basis=basis, cfg_mode="Linear Up", mimic_mode="Linear Up"), 5.0)
    first = shown[0].splitlines()[0]
    assert first.startswith("CFG acts from 1.00 to ")
    assert first.startswith("CFG acts from 1.00 to 5.00, mimic from 1.00 to 2.50.") == (
        basis == "steps"
    )


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde"])
@pytest.mark.parametrize("basis", ["upstream", "steps", "sigma"])
def test_second_order_samplers_run(model: Any, sampler: str, basis: str) -> None:
    """They ask between the steps, where the place lies between those of the steps."""
    assert torch.isfinite(
        sample(patched(model, basis=basis, cfg_mode="Power Up"), 5.0, sampler)
    ).all()


def test_equal_scales_are_plain_guidance_on_the_published_basis(
    model: Any, shown: list[str]
) -> None:
    settings = {"mimic_scale": 5.0, "interpolate_phi": 1.0}
    plain = sample(model, 5.0)
    assert torch.allclose(sample(patched(model, **settings), 5.0), plain, atol=1e-4)
    assert shown[0].startswith("Plain CFG of 5.00: ")
    assert not torch.allclose(sample(patched(model, **settings, basis="steps"), 5.0), plain)


def test_every_run_is_told_once(model: Any, shown: list[str]) -> None:
    ours = patched(model)
    for count in (1, 2):
        sample(ours, 5.0, "heun")
        assert len(shown) == count


def test_a_sample_without_a_negative_keeps_its_prediction(model: Any) -> None:
    """Where others of its batch have one: a guider gives it the positive twice."""
    settings = {"scaling_startpoint": "ZERO", "threshold_percentile": 0.9, "interpolate_phi": 1.0}
    function = patched(model, **settings).model_options["sampler_cfg_function"]
    positive, negative = torch.randn(2, 2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    negative[0] = positive[0]
    args = {
        "cond_denoised": positive,
        "uncond_denoised": negative,
        "cond": -positive,
        "input_uncond": negative,
        "input": torch.zeros_like(positive),
        "sigma": torch.tensor([0.5, 0.5]),
        "cond_scale": torch.tensor(5.0),
        "model": model.model,
        "model_options": {},
    }
    guided = -function(args)
    assert args["cond_scale"] == 5.0  # the known extension writes to it
    assert torch.equal(guided[0], positive[0])
    assert not torch.allclose(guided[1], positive[1])


def test_a_batch_gives_what_its_samples_give(model: Any) -> None:
    both = sample(patched(model, separate_feature_channels="disable"), 5.0, shape=(2, *SHAPE[1:]))
    alone = sample(patched(model, separate_feature_channels="disable"), 5.0)
    assert torch.allclose(both[:1], alone, atol=1e-4)


def test_outside_its_range_the_prompt_acts_alone(model: Any) -> None:
    """A range that holds no step but the last one."""
    late = sample(patched(model, start_percent=1.0), 5.0)
    never_guided = sample(model, 1.0)
    assert not torch.allclose(late, never_guided, atol=1e-3)
    only_positive = model.clone()
    calls: list[int] = []

    def at_the_end(args: dict[str, Any]) -> Tensor:
        calls.append(1)
        return recipe_in_numpy(args) if len(calls) == STEPS else args["cond"]

    only_positive.set_model_sampler_cfg_function(at_the_end)
    assert torch.allclose(late, sample(only_positive, 5.0), atol=1e-4)


def test_another_guidance_is_refused(model: Any, tmp_path: Path) -> None:
    taken = model.clone()
    taken.set_model_sampler_cfg_function(lambda args: args["cond"])
    with pytest.raises(ValueError, match=r"^Another node has replaced the guidance of this MODEL"):
        patched(taken)


def test_a_range_that_is_empty_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^Dynamic Threshold CFG begins at 0\.8 and ends at 0\.2"):
        patched(model, start_percent=0.8, end_percent=0.2)


@pytest.mark.parametrize(
    ("basis", "acts"),
    # The published ramp goes by timesteps, 999 to 249 here; the others begin at 1.
    [("upstream", "0.00 to 3.76"), ("steps", "1.00 to 5.00"), ("sigma", "1.00 to 4.")],
)
def test_models_of_other_kinds_are_guided(shown: list[str], basis: str, acts: str) -> None:
    model = small_sd_15(CONTEXT)
    ramps = {"cfg_mode": "Linear Up", "mimic_mode": "Linear Up", "basis": basis}
    drawn = sample(patched(model, **ramps), 5.0, shape=(1, 4, 8, 8))
    assert shown[0].startswith(f"CFG acts from {acts}")
    assert not torch.allclose(drawn, sample(model, 5.0, shape=(1, 4, 8, 8)))
    assert torch.isfinite(drawn).all()
