"""The checkpoints of a run: which are kept, and what a crash or a full disk leaves of them."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from atelier.trainers import loop
from atelier.trainers.config import JobSettings
from atelier.trainers.control import Control
from atelier.trainers.data import TrainingData
from atelier.trainers.files import write_atomically
from atelier.trainers.hooks import Hooks, Step, Trained
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.rhythm import Rhythm
from atelier.trainers.run import Run
from atelier.trainers.status import read_status
from flux_files import write_flux
from runs import assert_same_lora, job
from small_disk import fill, small_disk
from training import training_data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="nf4")


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


def test_checkpoints_have_their_distance_in_epochs(run_job) -> None:
    """Four pictures in steps of three: an epoch is 1 1/3 steps, and three of them are four."""
    settings = dataclasses.replace(job(9, batch_size=1, gradient_accumulation=3))
    settings = dataclasses.replace(settings, checkpoint_every=3, checkpoint_unit="epochs")
    assert run_job(settings)[1].steps_saved() == [4, 8, 9]


@pytest.mark.parametrize(
    ("last", "steps"), [(0, [1, 2, 3, 4, 5]), (1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_the_last_checkpoints_are_kept(run_job, last: int, steps: list[int]) -> None:
    whole, _ = run_job(job(6), folder="whole")
    _, run = run_job(job(5, checkpoint_every=1, keep_checkpoints=last))
    assert run.steps_saved() == steps
    assert {path.name for path in (run.folder / "checkpoints").iterdir()} == {
        f"step-{step:06d}" for step in steps
    }
    assert_same_lora(run_job(job(6, checkpoint_every=1, keep_checkpoints=last))[0], whole)


@pytest.mark.parametrize("losses", [(5, 1, 2, 3, 4), (5, 4, 3, 2, 1), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("checkpoint_every", [1, 2, 250])
def test_the_best_checkpoint_is_kept_too(
    run_job,
    data: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[int, ...],
    last: int,
    checkpoint_every: int,
) -> None:
    measured = iter(losses)
    monkeypatch.setattr(loop, "held_out_loss", lambda *_, **__: float(next(measured)))
    hooks = Hooks(held_out=data, validation=Rhythm(every=1, at_start=False))
    settings = job(5, checkpoint_every=checkpoint_every, keep_checkpoints=last)
    _, run = run_job(settings, hooks)
    best = 1 + losses.index(min(losses))
    assert run.best_step() == best
    # Saved at its distance, whenever it was the best until then, and at the end.
    ever_best = {n for n in range(1, 6) if losses[n - 1] < min(losses[: n - 1], default=9)}
    saved = sorted(ever_best | set(range(checkpoint_every, 6, checkpoint_every)) | {5})
    assert run.steps_saved() == sorted({best, *saved[-last:]})


def test_a_crash_while_checkpoints_are_removed_leaves_whole_ones(
    run_job, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_job(job(4), folder="whole")

    original = shutil.rmtree

    def half(folder: Path, **options: bool) -> None:
        if "dropped" not in folder.name:
            return original(folder, **options)
        (folder / "adapter.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as crash:
        crash.setattr(shutil, "rmtree", half)
        crash.setattr(Run, "write_status", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            run_job(job(4, checkpoint_every=1, keep_checkpoints=1))
    run = run_job(job(4, keep_checkpoints=1))[1]
    names = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert names == {"step-000004"}
    assert_same_lora(run_job(job(4))[0], whole)


def fill_before_a_step(disk: Path, step: int) -> Hooks:
    """So full that the metrics have no room either."""
    steps = iter(range(3, 100))  # two are done before

    def check() -> None:
        if next(steps) == step:
            fill(disk)
            (folder,) = (path for path in disk.iterdir() if path.is_dir())
            metrics = folder / "metrics.jsonl"
            with suppress(OSError), metrics.open("ab", buffering=0) as file:
                while file.write(b"\n"):
                    pass

    return Hooks(check_stop=check)


def fill_while_drawing(disk: Path, step: int) -> Hooks:
    def draw(at: int, _: dict[str, torch.Tensor]) -> None:
        if at == step:
            fill(disk)
            write_atomically(disk / "picture.png", lambda path: path.write_bytes(bytes(10_000)))

    return Hooks(sample=draw, validation=Rhythm(every=1))


def fill_while_paused(disk: Path, step: int) -> Hooks:
    """The state `paused` cannot be written."""
    control = Control()

    def ask(at: Step) -> None:
        if at.step == step:
            control.request("pause")

    def on_pause() -> None:
        fill(disk)

    return Hooks(control=control, on_step=ask, on_pause=on_pause)


@pytest.mark.parametrize("fills", [fill_before_a_step, fill_while_drawing, fill_while_paused])
def test_a_disk_that_is_full_for_anything_keeps_the_last_checkpoint(
    run_job, tmp_path: Path, fills: Callable[[Path, int], Hooks]
) -> None:
    whole, _ = run_job(job(4), folder="whole")
    with small_disk(tmp_path / "disk", 8) as disk:
        run_job(job(2), folder="disk")
        with pytest.raises(ValueError, match=r"^The disk of .* is full\. Free some space"):
            run_job(job(4), fills(disk, 3), folder="disk")
        (disk / "filler").unlink()
        assert not (disk / "picture.png").exists()
        resumed, run = run_job(job(4), folder="disk")
        assert_same_lora(resumed, whole)
        status = read_status(run.folder)
        assert status is not None
        assert status.state == "finished"
