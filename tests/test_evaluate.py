"""The evaluation loss against a computation with diffusers' own packing, picture by picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from atelier.trainers.data import TrainingData
from atelier.trainers.evaluate import EVAL_SIGMAS, eval_loss, held_out_loss, predict_by
from atelier.trainers.flow import seeded
from atelier.trainers.flux import build_transformer
from atelier.trainers.hooks import Hooks, Trained
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.rhythm import Rhythm
from atelier.trainers.run import Run
from atelier.trainers.status import read_status
from dense import dense_transformer, stored_tensors
from diffusers import FluxPipeline, FluxTransformer2DModel
from flux_files import write_flux
from peft import LoraConfig, set_peft_model_state_dict
from runs import LORA, Stop, assert_same_checkpoint, assert_same_lora, job, stop_before
from torch import Tensor
from training import training_data, with_entries

GUIDANCE = 1.5
SEED = 7


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)


@pytest.fixture
def task() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(3, 16, 4, 6, generator=generator),
        "prompt_embeds": torch.randn(3, 5, 24, generator=generator),
        "pooled": torch.randn(3, 12, generator=generator),
    }


def measure(transformer, task: dict[str, Tensor], **options) -> float:
    options = {"guidance": GUIDANCE, "seed": SEED, **options}
    return eval_loss(
        transformer,
        task["latents"],
        prompt_embeds=task["prompt_embeds"],
        pooled=task["pooled"],
        **options,
    )


def reference(transformer, task: dict[str, Tensor], sigma: float, number: int, row: int) -> float:
    """The loss of one picture at one sigma, by diffusers' functions."""
    clean = task["latents"][row : row + 1]
    noise = torch.randn(clean.shape[1:], generator=seeded(SEED, "eval", number, row))[None]
    noisy = (1 - sigma) * clean + sigma * noise
    prediction = transformer(
        hidden_states=FluxPipeline._pack_latents(noisy, 1, 16, 4, 6),
        encoder_hidden_states=task["prompt_embeds"][row : row + 1],
        pooled_projections=task["pooled"][row : row + 1],
        timestep=torch.tensor([sigma]),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
        guidance=torch.tensor([GUIDANCE]),
    ).sample
    target = FluxPipeline._pack_latents(noise - clean, 1, 16, 4, 6)
    return float((prediction - target).square().mean())


def test_the_loss_equals_diffusers_picture_by_picture(transformer, task) -> None:
    expected = [
        reference(transformer, task, sigma, number, row)
        for number, sigma in enumerate(EVAL_SIGMAS)
        for row in range(3)
    ]
    assert measure(transformer, task) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_batch_size_does_not_change_the_loss(transformer, task) -> None:
    assert measure(transformer, task, batch_size=2) == pytest.approx(
        measure(transformer, task, batch_size=3), rel=1e-6
    )


def test_the_noise_depends_on_the_seed_alone(transformer, task) -> None:
    torch.manual_seed(3)
    first = measure(transformer, task)
    torch.manual_seed(4)
    assert measure(transformer, task) == first
    assert measure(transformer, task, seed=SEED + 1) != first


def test_sigmas_are_the_middles_of_equal_parts() -> None:
    parts = len(EVAL_SIGMAS)
    assert [(number + 0.5) / parts for number in range(parts)] == list(EVAL_SIGMAS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="nf4")


@pytest.fixture(scope="module")
def all_data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Six pictures of two sizes."""
    sizes = ((64, 64), (96, 64)) * 3
    return training_data(tmp_path_factory.mktemp("caches"), sizes)


def part(data: TrainingData, start: int, stop: int) -> TrainingData:
    entries = data.latents.entries[start:stop]
    return dataclasses.replace(data, latents=with_entries(data.latents, entries))


@pytest.fixture(scope="module")
def trained(all_data: TrainingData) -> TrainingData:
    return part(all_data, 0, 3)


@pytest.fixture(scope="module")
def held_out(all_data: TrainingData) -> TrainingData:
    return part(all_data, 3, 6)


@pytest.fixture
def run_job(tmp_path: Path, base: LoadedFlux, trained: TrainingData):
    def run_it(num_steps: int, hooks: Hooks | None = None, folder: str = "runs", **settings):
        made = job(num_steps, **settings)
        run = open_run(tmp_path / folder, made, base, trained)
        return train(run, base, trained, made, hooks), run

    return run_it


RunJob = Callable[..., tuple[Trained, Run]]


def watching(held_out: TrainingData, every: int = 2, **options) -> Hooks:
    return Hooks(held_out=held_out, validation=Rhythm(every=every), **options)


def plain_held_out_loss(lora: dict[str, Tensor], data: TrainingData, guidance: float) -> float:
    """The documented definition with diffusers' network, its packing and peft's LoRA: the mean
    over pictures and eight shares of noise, each pair with noise of its own by the picture's key.
    """
    model = dense_transformer(stored_tensors("nf4"))
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=LORA.rank, lora_alpha=LORA.rank, target_modules=targets))
    assert not set_peft_model_state_dict(model, lora).unexpected_keys
    losses = []
    for entry in data.latents.entries:
        clean = data.latents.load(entry.name).mean[None]
        text = data.prompts.load(entry.texts[0][0])
        _, channels, height, width = clean.shape
        for number in range(8):
            sigma = (number + 0.5) / 8
            noise = torch.randn(clean.shape[1:], generator=seeded(0, "eval", number, entry.name))
            noisy = (1 - sigma) * clean + sigma * noise[None]
            with torch.no_grad():
                prediction = model(
                    hidden_states=FluxPipeline._pack_latents(noisy, 1, channels, height, width),
                    encoder_hidden_states=text.prompt_embeds[None].float(),
                    pooled_projections=text.pooled[None].float(),
                    timestep=torch.tensor([sigma]),
                    img_ids=FluxPipeline._prepare_latent_image_ids(
                        1, height // 2, width // 2, torch.device("cpu"), torch.float32
                    ),
                    txt_ids=torch.zeros(text.prompt_embeds.shape[0], 3),
                    guidance=torch.tensor([guidance]),
                ).sample
            target = FluxPipeline._pack_latents(noise[None] - clean, 1, channels, height, width)
            losses.append((prediction - target).square().mean().item())
    return sum(losses) / len(losses)


def test_the_eval_loss_of_a_run_is_that_of_diffusers(
    run_job: RunJob, held_out: TrainingData
) -> None:
    drawn: dict[int, dict[str, Tensor]] = {}
    hooks = watching(held_out, sample=drawn.__setitem__)
    trained, run = run_job(4, hooks, guidance=3.5)
    found = run.eval_losses()
    assert list(found) == [0, 2, 4]
    for step, loss in found.items():
        lora = drawn[step] if step < 4 else trained.lora
        assert loss == pytest.approx(plain_held_out_loss(lora, held_out, 3.5), rel=1e-5)
    assert len(set(found.values())) == 3


def test_measuring_does_not_change_the_training(run_job: RunJob, held_out: TrainingData) -> None:
    plain, plain_run = run_job(4, folder="plain")
    watched, run = run_job(4, watching(held_out, every=1), folder="watched")
    assert_same_lora(watched, plain)
    assert_same_checkpoint(run.load(4), plain_run.load(4))


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    base: LoadedFlux,
    trained: TrainingData,
    held_out: TrainingData,
) -> tuple[Trained, Run]:
    run = open_run(tmp_path_factory.mktemp("whole"), job(4), base, trained)
    return train(run, base, trained, job(4), watching(held_out)), run


@pytest.mark.parametrize("stop_at", [1, 3, 4, 6, 9, 10, 12])
def test_every_step_is_measured_once_also_after_a_resume(
    run_job: RunJob, held_out: TrainingData, whole: tuple[Trained, Run], stop_at: int
) -> None:
    """Cancelled in a measurement of three looks, the last one too, or between two of its steps."""
    check = stop_before(stop_at).check_stop
    with pytest.raises(Stop):
        run_job(4, watching(held_out, check_stop=check))
    resumed, run = run_job(4, watching(held_out))
    measured = [line["step"] for line in run.metrics() if "eval_loss" in line]
    assert measured == [0, 2, 4]
    assert run.eval_losses() == whole[1].eval_losses()
    assert_same_lora(resumed, whole[0])
    status = read_status(run.folder)
    assert status is not None
    assert (status.state, status.step) == ("finished", 4)


def test_the_end_is_measured_if_it_is_wanted(run_job: RunJob, held_out: TrainingData) -> None:
    hooks = Hooks(held_out=held_out, validation=Rhythm(every=2, at_start=False))
    assert list(run_job(5, hooks, folder="with")[1].eval_losses()) == [2, 4, 5]
    hooks = Hooks(held_out=held_out, validation=Rhythm(every=2, at_end=False))
    assert list(run_job(5, hooks, folder="without")[1].eval_losses()) == [0, 2, 4]


def test_losses_on_other_pictures_are_no_part_of_the_curve(
    run_job: RunJob, all_data: TrainingData, held_out: TrainingData
) -> None:
    """Measured before a cancel. Without held out pictures, what is there stays."""
    others = part(all_data, 3, 4)
    expected = run_job(6, watching(others), folder="alone")[1].eval_losses()
    with pytest.raises(Stop):
        run_job(6, watching(held_out, check_stop=stop_before(13).check_stop))
    _, run = run_job(6, watching(others))
    found = run.eval_losses()
    assert found == {step: expected[step] for step in found}
    assert 6 in found
    run_job(8)
    assert run.eval_losses() == found


def test_held_out_pictures_are_only_looked_at(
    run_job: RunJob,
    trained: TrainingData,
    held_out: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[str] = []
    original = TrainingData.load
    monkeypatch.setattr(
        TrainingData,
        "load",
        lambda self, samples, *rest: (
            batches.extend(sample.key for sample in samples) or original(self, samples, *rest)
        ),
    )
    run_job(6, watching(held_out))
    assert {*batches} == {entry.name for entry in trained.latents.entries}
    assert not {*batches} & {entry.name for entry in held_out.latents.entries}


def test_a_picture_keeps_its_noise_when_others_are_added(
    base: LoadedFlux, all_data: TrainingData
) -> None:
    network = build_transformer(base.store, base.config, torch.float32)

    def measured(data: TrainingData) -> float:
        predict = predict_by(network, guidance=1.0, dtype=torch.float32)
        return held_out_loss(predict, data, device=torch.device("cpu"))

    alone = [measured(part(all_data, number, number + 1)) for number in range(6)]
    assert len(set(alone)) == 6
    assert measured(all_data) == pytest.approx(sum(alone) / 6, rel=1e-6)
    entries = all_data.latents.entries[::-1]
    turned = dataclasses.replace(all_data, latents=with_entries(all_data.latents, entries))
    assert measured(turned) == measured(all_data)
