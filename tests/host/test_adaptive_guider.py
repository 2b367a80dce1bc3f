"""Adaptive Guider inside ComfyUI's own sampling, on a tiny FLUX."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import executor
import pytest
import torch
from atelier.nodes import host
from atelier.nodes.adaptive_guider import AdaptiveGuider
from atelier.nodes.guidance import DynamicThresholdCfg
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import apply_lora
from atelier.nodes.native_ranges import SamplingRange
from atelier.trainers.load import load_flux
from flux_files import write_flux
from lora_files import lora_tensors
from torch import Tensor
from training import conditioning

SHAPE = (1, 16, 8, 8)
STEPS = 6
CFG = 3.0


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


POSITIVE, NEGATIVE = conditioning(1), conditioning(2)


def adaptive(model: Any, negative: list = NEGATIVE, **changed: Any) -> Any:
    """By the node itself, without a threshold where nothing is said."""

    class Called(AdaptiveGuider):
        hidden = type("Hidden", (), {"unique_id": "1"})

    values = {"cfg": CFG, "threshold": 1.0, "start_percent": 0.0, **changed}
    return Called.execute(model, POSITIVE, negative, **values).args[0]


def core(model: Any, cfg: float = CFG) -> Any:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(cfg)
    return guider


def all_sigmas(model: Any) -> Tensor:
    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", STEPS
    )


def sample(
    guider: Any,
    *,
    sampler: str = "euler",
    seeds: tuple[int, ...] = (0,),
    start: int = 0,
    end: int = STEPS,
    latents: Tensor | None = None,
) -> Tensor:
    """The latents of the steps from `start` to `end`, of `latents` or of noise."""
    empty = torch.zeros(len(seeds), *SHAPE[1:])
    noise = torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in seeds])
    sigmas = all_sigmas(guider.model_patcher)[start : end + 1]
    with torch.inference_mode():
        if latents is not None:  # as SamplerCustomAdvanced with DisableNoise
            noise, empty = torch.zeros_like(noise), latents
        kind = comfy.samplers.sampler_object(sampler)
        return guider.sample(noise, empty, kind, sigmas, disable_pbar=True, seed=0)


def in_two_parts(first: Any, second: Any, step: int) -> Tensor:
    """What two of ComfyUI's own samplers give, one after the other."""
    return sample(second, start=step, latents=sample(first, end=step))


def spied(model: Any) -> tuple[Any, list[tuple[float, Tensor]]]:
    """A clone whose sigmas and pairs of predictions are written down."""
    clone, seen = model.clone(), []

    def spy(args: dict[str, Any]) -> list[Tensor]:
        positive, negative = args["conds_out"]
        if args["conds"][1] is not None:
            pair = torch.stack([positive.flatten(1), negative.flatten(1)]).double()
            seen.append((float(args["sigma"].max()), pair))
        return args["conds_out"]

    clone.set_model_sampler_pre_cfg_function(spy)
    return clone, seen


def counted(model: Any) -> tuple[Any, list[tuple[float, int]]]:
    """A clone that writes down at which sigma the network computed how many predictions."""
    clone, calls = model.clone(), []

    def count(apply: Callable, args: dict[str, Any]) -> Tensor:
        calls.append((float(args["timestep"].max()), len(args["cond_or_uncond"])))
        return apply(args["input"], args["timestep"], **args["c"])

    clone.set_model_unet_function_wrapper(count)
    return clone, calls


def similarities(seen: list[tuple[float, Tensor]]) -> list[float]:
    """Written out, in float64."""
    return [float((c * u).sum() / (c.norm() * u.norm())) for _, (c, u) in seen]


def with_threshold_after(model: Any, num_steps: int) -> float:
    """A threshold that is reached first in the step number `num_steps`."""
    clone, seen = spied(model)
    sample(core(clone))
    found = similarities(seen)
    highest = max([-1.0, *found[: num_steps - 1]])
    assert found[num_steps - 1] > highest, found
    return (found[num_steps - 1] + highest) / 2


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "euler_cfg_pp"])
def test_with_a_threshold_of_1_it_is_the_guider_of_comfyui(model: Any, sampler: str) -> None:
    ours, theirs = sample(adaptive(model), sampler=sampler), sample(core(model), sampler=sampler)
    assert torch.equal(ours, theirs)


def test_hooks_of_other_nodes_run(model: Any) -> None:
    patched = model.clone()
    patched.set_model_sampler_pre_cfg_function(
        lambda args: [one * 0.9 for one in args["conds_out"]]
    )
    patched.set_model_sampler_cfg_function(lambda args: args["cond"] * 2 - args["uncond"])
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * 0.8)
    ours = sample(adaptive(patched))
    assert torch.equal(ours, sample(core(patched)))
    assert not torch.allclose(ours, sample(core(model)), atol=1e-2)


@pytest.mark.parametrize("step", [1, 3])
def test_the_first_steps_are_those_of_the_positive_prompt(model: Any, step: int) -> None:
    ours = sample(adaptive(model, start_percent=step / STEPS))
    assert torch.allclose(ours, in_two_parts(core(model, 1.0), core(model), step), atol=1e-5)
    assert not torch.allclose(ours, sample(core(model)), atol=1e-2)


def test_after_its_end_the_positive_prompt_acts_alone(model: Any) -> None:
    ours = sample(adaptive(model, end_percent=4.5 / STEPS))
    assert torch.allclose(ours, in_two_parts(core(model), core(model, 1.0), 5), atol=1e-5)


def test_the_negative_prompt_is_left_out_after_the_step_that_reaches_the_threshold(
    model: Any, shown: list[str]
) -> None:
    clone, calls = counted(model)
    ours = sample(adaptive(clone, threshold=with_threshold_after(model, 2)))
    assert torch.allclose(ours, in_two_parts(core(model), core(model, 1.0), 2), atol=1e-5)
    assert [number for _, number in calls] == [2, 2, 1, 1, 1, 1]
    sigma = float(all_sigmas(model)[1])
    assert shown == [
        "The negative prompt was computed 2 of 6 times.\n"
        f"Below sigma {sigma:.3f} it changed almost nothing and was left out."
    ]


def test_a_threshold_that_is_never_reached_says_how_near_it_was(
    model: Any, shown: list[str]
) -> None:
    clone, seen = spied(model)
    sample(adaptive(clone))
    assert shown == [
        "The negative prompt was computed 6 of 6 times.\n"
        f"The similarity of the two predictions came to {max(similarities(seen)):.4f}."
    ]


def test_a_guider_that_samples_again_gives_the_same(model: Any) -> None:
    """Also after a run that ended at lower sigmas than the next one begins at."""
    guider = adaptive(model, threshold=with_threshold_after(model, 2))
    first = sample(guider)
    late = sample(guider, start=4, latents=first)
    assert torch.equal(sample(guider), first)
    assert torch.equal(sample(guider, start=4, latents=first), late)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde"])
def test_one_sigma_is_always_treated_alike(model: Any, sampler: str) -> None:
    """Samplers of second order ask for it in two steps."""
    clone, calls = counted(model)
    latents = sample(adaptive(clone, threshold=with_threshold_after(model, 2)), sampler=sampler)
    assert torch.isfinite(latents).all()
    with_negative = [sigma for sigma, number in calls if number == 2]
    alone = [sigma for sigma, number in calls if number == 1]
    assert alone
    assert min(with_negative) > max(alone)


def test_a_sampler_that_chooses_its_own_sigmas_runs(model: Any, shown: list[str]) -> None:
    """It goes back to higher ones when a step was too long."""
    guider = adaptive(model, threshold=with_threshold_after(model, 2))
    assert torch.isfinite(sample(guider, sampler="dpm_adaptive")).all()
    assert "it changed almost nothing and was left out" in shown[0]


def test_a_batch_gives_what_its_samples_give(model: Any) -> None:
    """The samples reach the threshold in different steps."""
    ends = {}
    clone, seen = spied(model)
    for seed in (0, 1):
        seen.clear()
        sample(core(clone), seeds=(seed,))
        ends[seed] = similarities(seen)
    between = [(a + b) / 2 for one in ends.values() for a, b in pairwise(one) if a < b]

    def first_reached(seed: int, threshold: float) -> int:
        return next((n for n, alike in enumerate(ends[seed]) if alike >= threshold), STEPS)

    threshold = next(t for t in between if first_reached(0, t) != first_reached(1, t))
    guider = adaptive(model, threshold=threshold)
    both = sample(guider, seeds=(0, 1))
    for index, seed in enumerate((0, 1)):
        assert torch.allclose(both[index : index + 1], sample(guider, seeds=(seed,)), atol=1e-4)


def test_a_negative_that_ends_early_leaves_the_positive(model: Any) -> None:
    """ComfyUI gives zeros for it then, from which plain guidance would lead away."""
    early = conditioning(2, start_percent=0.0, end_percent=2.5 / STEPS)
    ours = sample(adaptive(model, negative=early))
    assert torch.allclose(ours, in_two_parts(core(model), core(model, 1.0), 3), atol=1e-5)


def test_it_composes_with_dynamic_thresholding(model: Any, shown: list[str]) -> None:
    inputs = DynamicThresholdCfg.GET_SCHEMA().inputs
    defaults = {one.id: one.default for one in inputs if one.id != "model"}

    class Called(DynamicThresholdCfg):
        hidden = type("Hidden", (), {"unique_id": "2"})

    patched = Called.execute(model, **defaults).args[0]
    assert torch.equal(sample(adaptive(patched, cfg=5.0)), sample(core(patched, 5.0)))
    ours = sample(adaptive(patched, cfg=5.0, end_percent=2.5 / STEPS))
    theirs = in_two_parts(core(patched, 5.0), core(model, 1.0), 3)
    assert torch.allclose(ours, theirs, atol=1e-5)
    shown.clear()
    sample(adaptive(patched, cfg=2.0, start_percent=0.3))
    assert "falls to 0.92: below 1 it leads towards the negative" in shown[0]


def test_a_lora_for_a_part_of_the_sampling_acts(model: Any) -> None:
    span = SamplingRange(start_percent=0.2, end_percent=0.7)
    patched = apply_lora(model, lora_tensors("plain"), 1.0, span=span).model
    ours = sample(adaptive(patched))
    assert torch.equal(ours, sample(core(patched)))
    assert not torch.allclose(ours, sample(core(model)), atol=1e-3)


def test_a_range_that_is_empty_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match=r"^Adaptive Guider begins at 0\.8 and ends at 0\.2"):
        adaptive(model, start_percent=0.8, end_percent=0.2)
