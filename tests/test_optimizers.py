"""Every optimizer is that of its package, and resumes to the bit (DESIGN I5)."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from atelier.trainers.config import JobSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.hooks import Hooks, Trained
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.optimizer_settings import OPTIMIZERS, OptimizerSettings
from atelier.trainers.run import Run
from flux_files import write_flux
from runs import Stop, assert_same_checkpoint, assert_same_lora, job, stop_before
from training import training_data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="bf16")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


@pytest.fixture
def run_job(tmp_path: Path, base: LoadedFlux, data: TrainingData):
    """Train a job in a folder below the test's own; returns what came out and the run."""

    def run_it(
        settings: JobSettings, hooks: Hooks | None = None, folder: str = "runs"
    ) -> tuple[Trained, Run]:
        made = open_run(tmp_path / folder, settings, base, data)
        return train(made, base, data, settings, hooks), made

    return run_it


RESUMED = {name: OptimizerSettings(optimizer=name) for name in OPTIMIZERS} | {
    "cosine": OptimizerSettings(schedule="cosine", warmup_steps=1),
    "average": OptimizerSettings(ema_decay=0.9),
    "LoRA+": OptimizerSettings(lora_plus_ratio=16.0),
    "LoRA+ of stableadamw": OptimizerSettings(optimizer="stableadamw", lora_plus_ratio=4.0),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_and_resumed_run_ends_as_an_uninterrupted_one(run_job, name: str) -> None:
    rate = 1.0 if "prodigy" in name else 1e-3
    settings = job(4, optimizer=RESUMED[name], learning_rate=rate)
    whole, whole_run = run_job(settings, folder="whole")
    assert all(bool(tensor.isfinite().all()) for tensor in whole.lora.values())
    with pytest.raises(Stop):
        run_job(settings, stop_before(2), folder="halved")
    resumed, resumed_run = run_job(settings, folder="halved")
    assert resumed_run.steps_saved() == [2, 4]
    assert_same_lora(resumed, whole)
    assert_same_checkpoint(resumed_run.load(4), whole_run.load(4))
    assert len(set(whole.losses)) == 4
