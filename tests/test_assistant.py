"""A LoRA that only helps to train: it computes in a step, and nowhere else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.data import TrainingData
from atelier.trainers.differences import different_run
from atelier.trainers.evaluate import held_out_loss, predict_by
from atelier.trainers.flux import build_transformer, velocity, without_assistant
from atelier.trainers.hooks import Hooks
from atelier.trainers.job import read_job, run_job
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.rhythm import Rhythm
from dense import dense_transformer, stored_tensors
from flux_files import write_flux
from frozen_loras import frozen_loras, merged
from safetensors.torch import load_file
from torch import Tensor
from training import CONTEXT, VECTOR, training_data

ASSISTANT, ON_THE_MODEL = frozen_loras(1.0), frozen_loras(-0.4)
STEPS = 3


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


def load(flux_file: Path, **changes: object) -> LoadedFlux:
    base = load_flux(flux_file, format="bf16")
    return dataclasses.replace(base, **{"assistant": ASSISTANT, **changes})


def forward(transformer) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return velocity(
            transformer,
            torch.randn(2, 16, 8, 4, generator=generator),
            sigma=torch.tensor([0.6, 0.2]),
            prompt_embeds=torch.randn(2, 10, CONTEXT, generator=generator),
            pooled=torch.randn(2, VECTOR, generator=generator),
            guidance=2.0,
        )


def test_it_computes_with_the_models_loras_and_is_left_out_alone(flux_file: Path) -> None:
    base, stored = load(flux_file, frozen=ON_THE_MODEL), stored_tensors("bf16")
    network = build_transformer(base.store, base.config, torch.float32, base.frozen, base.assistant)
    both = forward(dense_transformer(merged(stored, (*ON_THE_MODEL, *ASSISTANT))))
    without = forward(dense_transformer(merged(stored, ON_THE_MODEL)))
    assert torch.max(torch.abs(both - without)) > 0.01
    assert torch.max(torch.abs(forward(network) - both)) <= 1e-5
    with without_assistant(network):
        left_out = forward(network)
    assert torch.max(torch.abs(left_out - without)) <= 1e-5
    assert torch.max(torch.abs(forward(network) - both)) <= 1e-5


def job(**settings: object) -> JobSettings:
    values = {"learning_rate": 1e-2, "compute_dtype": "fp32", "gradient_accumulation": 1}
    return JobSettings(
        name="test",
        length=Length(amount=STEPS),
        train=TrainSettings(**{**values, **settings}),  # pyright: ignore[reportArgumentType]
    )


def trained(root: Path, base: LoadedFlux, data: TrainingData, hooks: Hooks | None = None):
    run = open_run(root, job(), base, data)
    return train(run, base, data, job(), hooks), run


def test_a_training_sees_it_as_if_it_were_part_of_the_model(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    assisted, _ = trained(tmp_path, load(flux_file), data)
    frozen, _ = trained(tmp_path, load(flux_file, assistant=(), frozen=ASSISTANT), data)
    alone, _ = trained(tmp_path, load(flux_file, assistant=()), data)
    assert assisted.losses == frozen.losses
    assert all(torch.equal(tensor, frozen.lora[name]) for name, tensor in assisted.lora.items())
    assert abs(assisted.losses[0] - alone.losses[0]) > 1e-4


def test_held_out_pictures_are_measured_without_it(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    """The loss of the end is that of a plain diffusers network with the LoRA alone."""
    measured: list[float] = []
    hooks = Hooks(
        held_out=data,
        validation=Rhythm(every=0, at_end=True),
        on_measure=lambda step, values: measured.append(values["eval_loss"]),
    )
    outcome, _ = trained(tmp_path, load(flux_file), data, hooks)
    plain = dense_transformer(stored_tensors("bf16"))
    for name, down in outcome.lora.items():
        if name.endswith(".lora_A.weight"):  # of alpha = rank
            module = name.removesuffix(".lora_A.weight")
            weight = plain.get_submodule(module).weight
            weight.add_(outcome.lora[f"{module}.lora_B.weight"] @ down)
    predict = predict_by(plain, guidance=1.0, dtype=torch.float32)
    expected = held_out_loss(predict, data, device=torch.device("cpu"))
    assert measured[-1] == pytest.approx(expected, rel=1e-5)


def test_another_one_is_another_run_and_none_is_the_run_of_before(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    one, *others = ASSISTANT
    bases = [
        load(flux_file, assistant=assistant)
        for assistant in ((), ASSISTANT, (one,), (dataclasses.replace(one, scale=2.0), *others))
    ]
    bases.append(load(flux_file, assistant=(), frozen=ASSISTANT))
    runs = [open_run(tmp_path, job(), base, data) for base in bases]
    assert len({run.name for run in runs}) == len(runs)
    assert "assistant_loras" not in runs[0].identity.to_json()
    trained(tmp_path, bases[1], data)
    sentence = different_run(runs[1].folder, runs[2].identity, {})
    assert "was trained differently: the assistant." in sentence


def test_the_job_file_trains_the_same_again(
    flux_file: Path, data: TrainingData, tmp_path: Path
) -> None:
    base = load(flux_file, frozen=ON_THE_MODEL)
    outcome, run = trained(tmp_path / "first", base, data)
    read = read_job(run.folder / "job.json")
    path = run_job(read, tmp_path / "second", Hooks())
    assert path.name == f"{run.name}-{STEPS}.safetensors"  # the same identity
    tensors = load_file(path)
    assert all(torch.equal(tensors[f"transformer.{n}"], t) for n, t in outcome.lora.items())
