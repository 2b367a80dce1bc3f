"""The training loop: that of diffusers and peft, resumable to the bit (DESIGN I2, I5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from atelier.trainers import loop
from atelier.trainers import step as training_step
from atelier.trainers.adapters import attach_lora
from atelier.trainers.caches import LatentSubset
from atelier.trainers.config import JobSettings, Length
from atelier.trainers.data import TrainingData
from atelier.trainers.flow_settings import (
    FlowSettings,
    LossSettings,
    RolloutSettings,
    TimestepSettings,
)
from atelier.trainers.flux import build_transformer
from atelier.trainers.formats import FORMATS
from atelier.trainers.hooks import Hooks, Step, Trained
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.optimizer_settings import OptimizerSettings
from atelier.trainers.rhythm import Rhythm
from atelier.trainers.run import Run
from bitsandbytes.optim import AdamW8bit
from dense import dense_transformer, stored_tensors
from flux_files import write_flux
from plain_loop import plain_loop
from runs import LORA, Stop, assert_same_checkpoint, job, stop_before
from small_disk import fill, small_disk
from training import training_data, write_entries


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture(scope="module")
def base(flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format="bf16")


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


RESUMED = {
    "fp32": {},
    "bf16": {"compute_dtype": "bf16"},
    "fp16": {"compute_dtype": "fp16"},
    "batch of 2": {"batch_size": 2},
    "accumulation of 2": {"gradient_accumulation": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "random draws": {
        "flow": FlowSettings(
            noise_offset=0.1,
            guidance_max=4.0,
            rollout=RolloutSettings(max_offset=3, ramp_steps=3, probability=1.0),
        )
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_stopped_and_resumed_run_ends_as_an_uninterrupted_one(run_job, name: str) -> None:
    settings = job(4, **RESUMED[name])
    # In the middle of a step, if it has several parts.
    accumulation = settings.train.gradient_accumulation
    stop_at = 2 * accumulation + accumulation // 2
    whole, whole_run = run_job(settings, folder="whole")
    with pytest.raises(Stop):
        run_job(settings, stop_before(stop_at), folder="halved")
    resumed, resumed_run = run_job(settings, folder="halved")
    assert resumed_run.steps_saved() == [2, 4]
    assert resumed.losses == whole.losses
    assert all(torch.equal(resumed.lora[key], whole.lora[key]) for key in whole.lora)
    assert_same_checkpoint(resumed_run.load(4), whole_run.load(4))


def test_the_state_of_eight_bits_is_among_what_is_resumed(run_job) -> None:
    """Guards the test above: small tensors would all have 32 bits."""
    dtypes = {tensor.dtype for tensor in run_job(job(1))[1].load(1).optimizer.values()}
    assert torch.uint8 in dtypes


def test_a_run_stopped_twice_ends_the_same(run_job) -> None:
    settings = job(4)
    whole, _ = run_job(settings, folder="whole")
    for count in (1, 2):
        with pytest.raises(Stop):
            run_job(settings, stop_before(count), folder="cut")
    resumed, cut = run_job(settings, folder="cut")
    assert cut.steps_saved() == [1, 3, 4]
    assert resumed.losses == whole.losses


def test_a_longer_run_goes_on_from_a_finished_one(run_job) -> None:
    whole, _ = run_job(job(4), folder="whole")
    run_job(job(2), folder="grown")
    grown, _ = run_job(job(4), folder="grown")
    assert grown.losses == whole.losses
    assert all(torch.equal(grown.lora[key], whole.lora[key]) for key in whole.lora)


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        *((format, {}) for format in FORMATS),
        ("bf16", {"batch_size": 2, "guidance": 3.5}),
        ("bf16", {"gradient_accumulation": 2, "seed": 3, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_a_plain_loop_with_the_stored_weights(
    tmp_path: Path, flux_file: Path, data: TrainingData, format: str, settings: dict
) -> None:
    clipped = OptimizerSettings(clip_limit=0.05)
    job_of_five = job(5, learning_rate=1e-3, optimizer=clipped, **settings)
    base = load_flux(flux_file, format=format)
    transformer = build_transformer(base.store, base.config, torch.float32)
    start = attach_lora(transformer, LORA, seed=job_of_five.train.seed).state()
    model = dense_transformer(stored_tensors(format))
    losses, norms = plain_loop(model, data, job_of_five, start, AdamW8bit)
    run = open_run(tmp_path, job_of_five, base, data)
    found = train(run, base, data, job_of_five).losses
    # The loss towards a teacher is nearly nothing, and a difference of nearly equal numbers.
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-8)
    found_norms = [line["grad_norm"] for line in run.metrics()]
    torch.testing.assert_close(found_norms, norms, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    """Two pictures, one of them with a mask, beside two for regularization."""
    folder = tmp_path_factory.mktemp("masked caches")
    data = training_data(folder)
    mask = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    write_entries(folder, {"mask": {"mask": mask}})
    first, second, *others = data.latents.entries
    subsets = (
        LatentSubset(name="taught", entries=(dataclasses.replace(first, masks=("mask",)), second)),
        LatentSubset(
            name="kept",
            entries=tuple(dataclasses.replace(e, is_regularization=True) for e in others),
        ),
    )
    return dataclasses.replace(data, latents=dataclasses.replace(data.latents, subsets=subsets))


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"gradient_checkpointing": True}], ids=str)
def test_masks_and_regularization_are_those_of_a_plain_loop(
    tmp_path: Path, flux_file: Path, masked: TrainingData, settings: dict
) -> None:
    test_losses_and_gradients_are_those_of_a_plain_loop_with_the_stored_weights(
        tmp_path, flux_file, masked, "bf16", settings
    )


def test_regularization_alone_leaves_the_lora_without_effect(
    tmp_path: Path, base: LoadedFlux, masked: TrainingData
) -> None:
    """From the first step on the model with it does what the model without it does."""
    (_, kept) = masked.latents.subsets
    latents = dataclasses.replace(masked.latents, subsets=(kept,))
    data = dataclasses.replace(masked, latents=latents)
    trained = train(open_run(tmp_path, job(3), base, data), base, data, job(3))
    assert trained.losses == [0, 0, 0]
    ups = [tensor for name, tensor in trained.lora.items() if ".lora_B." in name]
    assert ups
    assert not any(up.any() for up in ups)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_gradients_of_short_dtypes_have_the_size_of_float32(run_job, dtype: str) -> None:
    """Those of fp16 are computed scaled, and clipped and logged as they are."""
    (expected,) = run_job(job(1))[1].metrics()
    (found,) = run_job(job(1, compute_dtype=dtype))[1].metrics()
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_the_loss_falls_on_one_picture(tmp_path: Path, base: LoadedFlux) -> None:
    one = training_data(tmp_path / "caches", ((64, 64),), std=0.0)
    settings = job(30)
    losses = train(open_run(tmp_path, settings, base, one), base, one, settings).losses
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def finish(run_job: Callable) -> None:
    run_job(job(1))


def cancel(run_job: Callable) -> None:
    with pytest.raises(Stop):
        run_job(job(2), stop_before(1))


def fail(run_job: Callable) -> None:
    def broken(step: Step) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_job(job(2), Hooks(on_step=broken))


@pytest.mark.parametrize("end", [finish, cancel, fail], ids=lambda end: end.__name__)
def test_the_bytes_of_the_base_do_not_change(run_job, base: LoadedFlux, end: Callable) -> None:
    before = base.store.content_hash()
    end(run_job)
    assert base.store.content_hash() == before


def test_an_error_in_a_hook_saves_the_step_before_it(run_job, tmp_path: Path) -> None:
    fail(run_job)
    (folder,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]


def test_timesteps_and_weights_of_the_job_are_trained_with(run_job) -> None:
    """The first step, whose LoRA does nothing yet: at a sigma of 0.5 the weight sigma^-2 is 4."""
    middle = TimestepSettings(sampling="custom", custom=(0.5,))
    plain, weighted = (
        run_job(
            job(1, flow=FlowSettings(timesteps=middle, loss=LossSettings(weight=weight))),
            folder=weight,
        )[0]
        for weight in ("none", "sigma_sqrt")
    )
    uniform = run_job(job(1), folder="uniform")[0]
    assert weighted.losses == pytest.approx([4 * plain.losses[0]])
    assert plain.losses != uniform.losses


def diverging_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = training_step.training_loss, iter(range(1000))

    def training_loss(*args: object) -> torch.Tensor:
        loss = original(*args)
        return loss * float("nan") if next(calls) == count else loss

    monkeypatch.setattr(training_step, "training_loss", training_loss)


@pytest.mark.parametrize("count", [0, 2])
def test_a_loss_that_is_no_number_is_one_sentence(
    run_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    diverging_at(count, monkeypatch)
    said = {0: "in the first step, .* file or", 2: r"after 2 steps: .* rate \(0\.01\)\."}
    with pytest.raises(ValueError, match=f"not a number {said[count]}"):
        run_job(job(4))
    (folder,) = (tmp_path / "runs").iterdir()
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved == ([f"step-{count:06d}"] if count else [])


def test_what_led_to_no_number_takes_no_good_checkpoints_place(
    run_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging_at(3, monkeypatch)
    with pytest.raises(ValueError, match="after 3 steps: the training diverged"):
        run_job(job(4, checkpoint_every=2, keep_checkpoints=1))
    (folder,) = (tmp_path / "runs").iterdir()
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["step-000002", "step-000003"]


def test_no_checkpoint_holds_weights_that_are_not_finite(
    run_job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient may overflow although its loss is finite."""
    original, calls = torch.nn.utils.clip_grad_norm_, iter(range(1000))

    def overflow(parameters: list, *args: object) -> torch.Tensor:
        norm = original(parameters, *args)  # pyright: ignore[reportArgumentType]
        if next(calls) == 1:
            parameters[0].grad.fill_(float("nan"))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(ValueError, match="diverged"):
        run_job(job(4, checkpoint_every=1))
    monkeypatch.undo()
    (folder,) = (tmp_path / "runs").iterdir()
    saved = [path.name for path in (folder / "checkpoints").iterdir()]
    assert saved == ["step-000001"]


def test_a_finished_run_is_answered_from_disk(run_job, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run_job(job(2))

    def forbidden(*_: object) -> None:
        raise AssertionError("a finished run was computed again")

    monkeypatch.setattr(training_step, "build_transformer", forbidden)
    again, _ = run_job(job(2))
    assert (again.step, again.losses) == (2, first.losses)
    assert all(torch.equal(again.lora[name], first.lora[name]) for name in first.lora)


def test_a_shorter_answer_keeps_the_losses_of_the_longer_run(run_job) -> None:
    longer, _ = run_job(job(4, checkpoint_every=2))
    shorter, _ = run_job(job(2, checkpoint_every=2))
    assert shorter.losses == longer.losses[:2]
    assert run_job(job(4, checkpoint_every=2))[0].losses == longer.losses


def test_checkpoints_have_their_distance_and_one_is_at_the_end(run_job) -> None:
    assert run_job(job(5, checkpoint_every=2))[1].steps_saved() == [2, 4, 5]


class Samples:
    def __init__(self, every: int) -> None:
        self.drawn: dict[int, dict[str, torch.Tensor]] = {}
        validation = Rhythm(every=every, at_start=every > 0)
        self.hooks = Hooks(sample=self.draw, validation=validation)

    def draw(self, step: int, lora: dict[str, torch.Tensor]) -> None:
        assert step not in self.drawn
        self.drawn[step] = lora


@pytest.mark.parametrize(("every", "steps"), [(0, []), (2, [0, 2, 4]), (5, [0]), (9, [0])])
def test_samples_are_drawn_at_these_steps(run_job, every: int, steps: list[int]) -> None:
    samples = Samples(every)
    run_job(job(5), samples.hooks)
    assert list(samples.drawn) == steps


def test_samples_have_the_weights_of_their_step(run_job) -> None:
    samples = Samples(2)
    _, run = run_job(job(3, checkpoint_every=2), samples.hooks)
    for step, lora in samples.drawn.items():
        expected = run.load(2).adapter if step else lora
        assert all(torch.equal(lora[name], expected[name]) for name in expected)
    assert not any(tensor.any() for name, tensor in samples.drawn[0].items() if "lora_B" in name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoints"])
def test_activations_in_ram_train_the_same_run(
    run_job, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    settings = job(2, gradient_checkpointing=checkpointing)
    plain, run = run_job(settings, folder="plain")
    kept = []

    class Counted(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            self.pack_hook = lambda tensor, pack=self.pack_hook: kept.append(tensor) or pack(tensor)

    monkeypatch.setattr(training_step, "save_on_cpu", Counted)
    in_ram, same = run_job(dataclasses.replace(settings, activations_in_ram=True), folder="ram")
    assert kept
    assert same.name == run.name
    assert plain.losses == in_ram.losses
    assert_same_checkpoint(run.load(2), same.load(2))


def test_samples_do_not_change_the_training(run_job) -> None:
    plain, _ = run_job(job(3), folder="plain")
    sampled, _ = run_job(job(3), Samples(1).hooks, folder="sampled")
    assert plain.losses == sampled.losses


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({}, 8),
        ({"batch_size": 2}, 4),
        ({"batch_size": 3}, 4),
        ({"gradient_accumulation": 2}, 4),
        ({"gradient_accumulation": 3}, 3),
        ({"batch_size": 4, "gradient_accumulation": 8}, 1),
    ],
    ids=str,
)
def test_two_epochs_of_four_pictures_are_so_many_steps(
    data: TrainingData, settings: dict, num_steps: int
) -> None:
    two_epochs = dataclasses.replace(job(**settings), length=Length(amount=2, unit="epochs"))
    assert two_epochs.length.num_steps(loop.steps_per_epoch(two_epochs, data)) == num_steps


def test_a_run_of_epochs_ends_after_its_steps(run_job) -> None:
    settings = dataclasses.replace(job(batch_size=2), length=Length(amount=1, unit="epochs"))
    starts: list[tuple[int, int]] = []
    trained, _ = run_job(settings, Hooks(on_start=lambda *start: starts.append(start)))
    assert starts == [(0, 2)]
    assert (trained.step, len(trained.losses)) == (2, 2)


def test_every_step_is_told_with_its_loss(run_job) -> None:
    told: list[Step] = []
    trained, _ = run_job(job(3), Hooks(on_step=told.append))
    assert [(step.step, step.num_steps) for step in told] == [(1, 3), (2, 3), (3, 3)]
    assert [step.loss for step in told] == trained.losses
    assert told[0].seconds_left == pytest.approx(2 * told[0].seconds_per_step)


def test_pictures_of_several_sizes_train(tmp_path: Path, base: LoadedFlux) -> None:
    mixed = training_data(tmp_path / "caches", ((64, 64), (96, 64), (64, 64)))
    settings = job(3, batch_size=2)
    trained = train(open_run(tmp_path, settings, base, mixed), base, mixed, settings)
    assert len(trained.losses) == 3


def test_a_full_disk_keeps_what_was_saved_and_training_goes_on_with_space(
    run_job, tmp_path: Path
) -> None:
    whole, _ = run_job(job(3), folder="whole")
    with small_disk(tmp_path / "disk", 8) as disk:
        settings = job(3, checkpoint_every=1)

        def fill_at_two(step: Step) -> None:
            if step.step == 2:
                fill(disk)

        with pytest.raises(
            ValueError, match=r"^The disk of .* is full\. Free some space and queue"
        ):
            run_job(settings, Hooks(on_step=fill_at_two), folder="disk")
        (disk / "filler").unlink()
        (folder,) = disk.iterdir()
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000001"]
        assert run_job(settings, folder="disk")[0].losses == whole.losses


@pytest.mark.parametrize(("channels", "shown"), [(384, 96), (128, 32)], ids=["fill", "depth"])
def test_extra_input_channels_are_one_sentence_before_anything_starts(
    tmp_path: Path, data: TrainingData, channels: int, shown: int
) -> None:
    base = load_flux(write_flux(tmp_path / "flux.safetensors", channels=channels), format="bf16")
    started: list[tuple[int, int]] = []
    hooks = Hooks(
        before_start=lambda: started.append((0, 0)), on_start=lambda *start: started.append(start)
    )
    with pytest.raises(ValueError, match=rf"^This FLUX takes {shown} latent channels .* samples"):
        train(open_run(tmp_path / "runs", job(), base, data), base, data, job(), hooks)
    assert not started
    assert not (tmp_path / "runs").exists()


def test_a_refusal_before_the_start_leaves_nothing(run_job, tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError("It does not fit.")

    with pytest.raises(ValueError, match=r"^It does not fit\.$"):
        run_job(job(), Hooks(before_start=refuse), folder="refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("done", [2, 3, 4], ids=["a part", "all of it", "more than asked for"])
def test_what_another_process_trains_before_the_start_is_kept(run_job, done: int) -> None:
    """The estimate of the memory takes seconds, in which another process may have the lock."""
    settings = job(3, checkpoint_every=1)
    expected, _ = run_job(settings, folder="alone")
    starts: list[tuple[int, int]] = []
    hooks = Hooks(
        before_start=lambda: run_job(job(done, checkpoint_every=1)),
        on_start=lambda *start: starts.append(start),
    )
    trained, run = run_job(settings, hooks)
    assert starts == [(min(done, 3), 3)]
    assert trained.losses == expected.losses
    assert [line["step"] for line in run.metrics()] == list(range(1, max(done, 3) + 1))


def test_a_run_that_is_being_trained_is_left_alone(run_job) -> None:
    settings = job(2, checkpoint_every=1)
    expected, _ = run_job(settings, folder="alone")
    refusals: list[str] = []

    def train_again(_: Step) -> None:
        started: list[tuple[int, int]] = []
        hooks = Hooks(on_start=lambda *start: started.append(start))
        with pytest.raises(ValueError, match="is being trained by another process") as refused:
            run_job(settings, hooks)
        assert not started  # so it has taken no device
        refusals.append(str(refused.value))

    trained, run = run_job(settings, Hooks(on_step=train_again))
    assert (
        refusals
        == [
            f"The run {run.name} is being trained by another process. Wait until that ends, or "
            "change the name for a run of its own."
        ]
        * 2
    )
    assert trained.losses == expected.losses
    assert run.steps_saved() == [1, 2]
    assert run_job(job(3))[0].step == 3
