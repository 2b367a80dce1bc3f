"""A training that goes wrong says so at once, why, and what to change; what was good is kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from atelier.trainers.caches import LatentSubset
from atelier.trainers.config import JobSettings, Schedule, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.flow_settings import FlowSettings, LossSettings, TimestepSettings
from atelier.trainers.hooks import Hooks
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.preservation_settings import PreservationSettings
from atelier.trainers.rhythm import Rhythm
from atelier.trainers.run import Run
from atelier.trainers.segments import slower_than_wished
from atelier.trainers.speed_settings import SpeedSettings, routes_from_text
from atelier.trainers.status import read_status
from atelier.trainers.watch import PATIENCE, WATCHED_STEPS, diverged, no_progress
from flux_files import write_flux
from runs import job
from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data, with_entries, write_entries


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="bf16")


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    return training_data(tmp_path / "caches", ((64, 64),) * 2)


def fails(run: Run, base: LoadedFlux, data: TrainingData, settings: JobSettings, says: str) -> None:
    """The training ends with the sentence, which its status keeps too."""
    with pytest.raises(ValueError, match=says) as raised:
        train(run, base, data, settings)
    status = read_status(run.folder)
    assert status is not None
    assert (status.state, status.error) == ("failed", str(raised.value))


def test_numbers_that_do_not_fit_fp16_end_it_in_the_first_step(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    huge = {
        "prompt_embeds": torch.full((TEXT_TOKENS, CONTEXT), 1e6),
        "pooled": torch.full((VECTOR,), 1e6),
    }
    write_entries(tmp_path / "caches", {"huge": huge})
    texts = tuple(dataclasses.replace(entry, key="huge") for entry in data.prompts.entries)
    prompts = dataclasses.replace(data.prompts, entries=texts)
    data, settings = dataclasses.replace(data, prompts=prompts), job(2, compute_dtype="fp16")
    run = open_run(tmp_path, settings, base, data)
    fails(run, base, data, settings, r"in the first step, .* \(fp16\), or its file is damaged")
    assert run.steps_saved() == []


def test_a_learning_rate_that_is_far_too_high_ends_it_within_a_step(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    settings = job(5, learning_rate=1e30)
    run = open_run(tmp_path, settings, base, data)
    fails(run, base, data, settings, r"after 1 steps: .* Lower the learning rate \(1e\+30\)")


def test_float16_that_overflows_without_a_scale_ends_it(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    """The scale falls from 4096 by halves; the loss itself is a number all the time."""
    flow = FlowSettings(
        timesteps=TimestepSettings(sampling="custom", custom=(1e-3,)),
        loss=LossSettings(weight="sigma_sqrt"),
    )
    kept = PreservationSettings(prior_weight=1e8)
    entries = tuple(dataclasses.replace(entry, is_prior=True) for entry in data.latents.entries)
    data = dataclasses.replace(data, latents=with_entries(data.latents, entries))
    settings = job(30, compute_dtype="fp16", flow=flow, preservation=kept)
    run = open_run(tmp_path, settings, base, data)
    fails(run, base, data, settings, "after 12 steps: .* to bf16 or fp32")
    assert [line["grad_norm"] for line in run.metrics()] == [None] * 12


def test_a_compute_dtype_that_is_wide_enough_is_not_said_to_be_the_cause() -> None:
    for step in (0, 5):
        assert "to bf16 or fp32" in str(diverged(step, TrainSettings(), torch.float16))
        for dtype in (torch.bfloat16, torch.float32):
            assert "bf16" not in str(diverged(step, TrainSettings(), dtype))


def masked(data: TrainingData, folder: Path, mask: torch.Tensor) -> TrainingData:
    """With this mask on every picture."""
    write_entries(folder, {"mask": {"mask": mask}})
    entries = tuple(dataclasses.replace(e, masks=("mask",)) for e in data.latents.entries)
    return dataclasses.replace(data, latents=with_entries(data.latents, entries))


def test_gradients_of_zero_end_it_after_twenty_steps(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    data = masked(data, tmp_path / "caches", torch.zeros(8, 8))
    run = open_run(tmp_path, job(30), base, data)
    fails(run, base, data, job(30), "All gradients of 20 steps were zero, .* masks are black")
    assert run.steps_saved() == [WATCHED_STEPS]


def test_a_lora_that_does_not_change_ends_it_after_twenty_steps(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    settings = job(30, learning_rate=1e-50)
    run = open_run(tmp_path, settings, base, data)
    fails(run, base, data, settings, r"did not change in 20 steps: .* \(1e-50\)")
    assert run.steps_saved() == [WATCHED_STEPS]


def test_pictures_that_begin_late_may_learn_nothing_before(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    """Regularization alone has no gradient: the LoRA does nothing yet."""
    first, second = data.latents.entries
    kept = LatentSubset(name="kept", entries=(dataclasses.replace(first, is_regularization=True),))
    late = LatentSubset(
        name="late", entries=(second,), schedule=Schedule(start_step=WATCHED_STEPS + 1)
    )
    latents = dataclasses.replace(data.latents, subsets=(kept, late))
    data, settings = dataclasses.replace(data, latents=latents), job(2 * WATCHED_STEPS + 3)
    run = open_run(tmp_path, settings, base, data)
    train(run, base, data, settings)
    norms = [line["grad_norm"] for line in run.metrics()]
    assert not any(norms[: WATCHED_STEPS + 1])
    assert any(norms[WATCHED_STEPS + 1 :])


def test_regularization_may_come_first_by_chance(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    first, second = data.latents.entries
    first = dataclasses.replace(first, is_regularization=True)
    subsets = tuple(
        LatentSubset(name=name, entries=(entry,), schedule=Schedule(probability=share))
        for name, entry, share in (("kept", first, 10.0), ("learned", second, 1.0))
    )
    latents = dataclasses.replace(data.latents, subsets=subsets)
    data, settings = dataclasses.replace(data, latents=latents), job(40, seed=2)
    run = open_run(tmp_path, settings, base, data)
    train(run, base, data, settings)
    norms = [line["grad_norm"] for line in run.metrics()]
    assert not any(norms[:WATCHED_STEPS])
    assert any(norms)


def test_a_dataset_that_begins_after_the_end_is_told(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    """And what is trained before is watched."""
    data = masked(data, tmp_path / "caches", torch.zeros(8, 8))
    first, second = data.latents.entries
    subsets = (
        LatentSubset(name="now", entries=(first,)),
        LatentSubset(name="late", entries=(second,), schedule=Schedule(start_step=30)),
    )
    data = dataclasses.replace(data, latents=dataclasses.replace(data.latents, subsets=subsets))
    told: list[str] = []
    run = open_run(tmp_path, job(30), base, data)
    with pytest.raises(ValueError, match="All gradients of 20 steps were zero"):
        train(run, base, data, job(30), Hooks(on_warning=told.append))
    (sentence,) = told
    assert "'late' is not trained: it begins after step 30, and the run ends at 30." in sentence


def test_regularization_alone_is_told(tmp_path: Path, base: LoadedFlux, data: TrainingData) -> None:
    entries = tuple(dataclasses.replace(e, is_regularization=True) for e in data.latents.entries)
    data = dataclasses.replace(data, latents=with_entries(data.latents, entries))
    run = open_run(tmp_path, job(30), base, data)
    fails(run, base, data, job(30), "all pictures are for regularization")


def test_a_held_out_loss_that_does_not_fall_is_told_once(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    other = training_data(tmp_path / "other", ((48, 48),))
    told: list[str] = []
    hooks = Hooks(held_out=other, validation=Rhythm(every=1, at_start=True), on_warning=told.append)
    settings = job(PATIENCE + 1, learning_rate=1e-50)
    run = open_run(tmp_path, settings, base, data)
    trained = train(run, base, data, settings, hooks)
    losses = run.eval_losses()
    assert len(set(losses.values())) == 1
    (sentence,) = told
    assert "not once below that of the start in 5 evaluations" in sentence
    assert trained.step == PATIENCE + 1


def test_what_keeps_speed_settings_from_their_effect_is_told() -> None:
    routed = SpeedSettings(tread=routes_from_text("0.5: 1 to -2"), compile=True)
    assert slower_than_wished(routed, dropout=0.0, has_masks=False) == []
    dropout, masks = slower_than_wished(routed, dropout=0.1, has_masks=True)
    assert "breaks compiled blocks apart" in dropout
    assert "more memory than the estimate" in masks
    assert slower_than_wished(SpeedSettings(), dropout=0.1, has_masks=True) == []


def test_no_progress_since_a_step_names_its_checkpoint() -> None:
    losses = {0: 1.0, 10: 0.8, 20: 0.5, 30: 0.6, 40: 0.55, 50: 0.7, 60: 0.5, 70: 0.9}
    assert no_progress({}) is None
    sentences = [
        no_progress(dict(list(losses.items())[:count])) for count in range(len(losses) + 1)
    ]
    assert [sentence is not None for sentence in sentences] == [False] * 8 + [True]
    assert "since step 20: " in (sentences[-1] or "")
    assert "The checkpoint of step 20 is kept" in (sentences[-1] or "")
    assert no_progress({**losses, 80: 0.9}) is None  # it was told
    assert no_progress({**losses, 80: 0.4}) is None
