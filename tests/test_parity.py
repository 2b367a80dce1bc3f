"""Fifty steps on the nano model: the loss curve of diffusers, peft and torch's AdamW."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from atelier.trainers.adapters import attach_lora
from atelier.trainers.data import TrainingData
from atelier.trainers.flux import build_transformer
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.optimizer_settings import OptimizerSettings
from dense import dense_transformer
from plain_loop import plain_loop
from runs import job
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import AdamW
from training import training_data

NANO = Path(__file__).resolve().parent.parent / "assets/nano/nano-flux.safetensors"
NUM_STEPS = 50


@pytest.fixture(scope="module")
def nano_tensors() -> dict[str, Tensor]:
    tensors = load_file(NANO)
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def base() -> LoadedFlux:
    return load_flux(NANO, format="bf16")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


@pytest.mark.parametrize("targets", ["qlora", "all"])
def test_losses_are_those_of_diffusers_and_peft(
    tmp_path: Path,
    base: LoadedFlux,
    nano_tensors: dict[str, Tensor],
    data: TrainingData,
    targets: str,
) -> None:
    optimizer = OptimizerSettings(optimizer="adamw")
    settings = dataclasses.replace(
        job(NUM_STEPS, learning_rate=1e-3, seed=1, optimizer=optimizer),
        lora=LoraSettings(targets=targets),
    )
    transformer = build_transformer(base.store, base.config, torch.float32)
    start = attach_lora(transformer, settings.lora, seed=1).state()
    model = dense_transformer(nano_tensors)
    losses, norms = plain_loop(model, data, settings, start, AdamW)
    run = open_run(tmp_path, settings, base, data)
    found = train(run, base, data, settings).losses
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=0)
    found_norms = [line["grad_norm"] for line in run.metrics()]
    torch.testing.assert_close(found_norms, norms, rtol=1e-3, atol=0)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])  # it learned something meanwhile
