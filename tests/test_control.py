"""What others ask of a running training: stop and keep, pause, go on, save, draw."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from atelier.trainers import step as training_step
from atelier.trainers.config import JobSettings
from atelier.trainers.control import REQUESTS, Control, Request
from atelier.trainers.data import TrainingData
from atelier.trainers.hooks import Hooks, Step, Trained
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, save_trained, train
from atelier.trainers.rhythm import Rhythm
from atelier.trainers.run import Run
from atelier.trainers.status import Status, read_status
from flux_files import write_flux
from runs import assert_same_checkpoint, assert_same_lora, job
from training import training_data


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="nf4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


class Cancel(KeyboardInterrupt):
    """What the queue's Cancel is without ComfyUI."""


class Trainer:
    """Trains in folders of a test, with requests at given steps."""

    def __init__(self, root: Path, base: LoadedFlux, data: TrainingData) -> None:
        self.root, self.base, self.data = root, base, data
        self.steps: list[int] = []
        self.states: list[str] = []

    def __call__(
        self,
        settings: JobSettings,
        *requests: tuple[int, Request],
        folder: str = "runs",
        go_on: bool = False,
        resume: str = "",
        **hooks: Any,
    ) -> tuple[Trained, Run]:
        """Ask for each of the requests after its step, for those of step 0 before the first."""
        control = hooks.pop("control", Control())
        self.steps, self.states = [], []

        def ask(step: int) -> None:
            for after, what in requests:
                if after == step:
                    control.request(what)

        def on_step(step: Step) -> None:
            self.steps.append(step.step)
            ask(step.step)

        def on_status(status: Status) -> None:
            self.states.append(status.state)

        own = Hooks(control=control, on_step=on_step, on_status=on_status, **hooks)
        run = open_run(self.root / folder, settings, self.base, self.data, resume=resume)
        ask(0)
        return train(run, self.base, self.data, settings, own, go_on=go_on), run


@pytest.fixture
def trainer(tmp_path: Path, base: LoadedFlux, data: TrainingData) -> Trainer:
    return Trainer(tmp_path, base, data)


def status(run: Run) -> Status:
    found = read_status(run.folder)
    assert found is not None
    return found


def test_stop_ends_after_the_step_and_keeps_it(trainer: Trainer) -> None:
    trained, run = trainer(job(8), (3, "stop"))
    assert trainer.steps == [1, 2, 3]
    assert trainer.states == ["training", "stopped"]
    assert (trained.step, len(trained.losses), run.steps_saved()) == (3, 3, [3])
    assert (status(run).state, status(run).step, status(run).num_steps) == ("stopped", 3, 8)
    assert status(run).error is None


def test_a_run_that_was_kept_is_answered_from_disk(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, run = trainer(job(8), (3, "stop"))
    metrics = (run.folder / "metrics.jsonl").read_bytes()

    def forbidden(*_: object) -> None:
        raise AssertionError("a kept run was trained on")

    monkeypatch.setattr(training_step, "build_transformer", forbidden)
    again, _ = trainer(job(8))
    assert again.step == 3
    assert_same_lora(again, kept)
    assert trainer.steps == trainer.states == []
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics
    assert status(run).state == "stopped"


def test_resume_goes_on_with_a_kept_run_as_if_it_had_not_been_stopped(trainer: Trainer) -> None:
    whole, whole_run = trainer(job(6), folder="whole")
    _, run = trainer(job(6), (2, "stop"))
    resumed, _ = trainer(job(6), go_on=True)
    assert trainer.steps == [3, 4, 5, 6]
    assert status(run).state == "finished"
    assert_same_lora(resumed, whole)
    assert_same_checkpoint(run.load(6), whole_run.load(6))


@pytest.mark.parametrize("length", [5, 7], ids=["shorter", "longer"])
def test_another_length_goes_on_with_a_kept_run(trainer: Trainer, length: int) -> None:
    whole, _ = trainer(job(length), folder="whole")
    trainer(job(6), (2, "stop"))
    extended, _ = trainer(job(length))
    assert trainer.steps == list(range(3, length + 1))
    assert_same_lora(extended, whole)


def test_stop_before_the_first_step_waits_for_it(trainer: Trainer) -> None:
    trained, run = trainer(job(4), (0, "stop"))
    assert (trainer.steps, trained.step, run.steps_saved()) == ([1], 1, [1])
    assert status(run).state == "stopped"


def test_stop_after_the_last_step_is_a_finished_run(trainer: Trainer) -> None:
    _, run = trainer(job(2), (2, "stop"))
    assert status(run).state == "finished"


def ask_when_paused(control: Control, run: Run, *what: Request) -> None:
    """From another thread, as a route does."""

    def ask() -> None:
        while not ((found := read_status(run.folder)) and found.state == "paused"):
            time.sleep(0.02)
        for request in what:
            control.request(request)

    threading.Thread(target=ask, daemon=True).start()


def paused_and_asked(
    trainer: Trainer, at: int, *what: Request, **hooks: Any
) -> tuple[Trained, Run, JobSettings]:
    control, settings = Control(), job(5)
    made = open_run(trainer.root / "runs", settings, trainer.base, trainer.data)
    ask_when_paused(control, made, *what)
    trained, run = trainer(settings, (at, "pause"), control=control, **hooks)
    return trained, run, settings


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_paused_run_goes_on_to_the_same_bits(trainer: Trainer, at: int) -> None:
    whole, whole_run = trainer(job(5), folder="whole")
    trained, run, _ = paused_and_asked(trainer, at, "resume")
    assert trainer.states == ["training", "paused", "training", "finished"]
    assert trainer.steps == [1, 2, 3, 4, 5]
    assert run.steps_saved() == ([at, 5] if at else [5])
    assert_same_lora(trained, whole)
    assert_same_checkpoint(run.load(5), whole_run.load(5))


def test_a_paused_run_is_saved_and_holds_nothing(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the network, nor its LoRA, nor the state of the optimizer."""
    built: list[weakref.ref] = []
    original = training_step.TrainState.__init__

    def remembered(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        built.extend(map(weakref.ref, (self.transformer, self.optimizer, *self.parameters)))

    monkeypatch.setattr(training_step.TrainState, "__init__", remembered)
    gc.collect()
    before = trainable_bytes()
    seen: list[tuple[bool, int]] = []

    def on_pause() -> None:
        gc.collect()
        alive = any(reference() is not None for reference in built)
        (folder,) = (trainer.root / "runs").iterdir()
        saved = [path.name for path in (folder / "checkpoints").iterdir()]
        assert saved == ["step-000002"]
        seen.append((alive, trainable_bytes() - before))

    paused_and_asked(trainer, 2, "resume", on_pause=on_pause)
    assert len(built) > 4
    assert seen == [(False, 0)]


def trainable_bytes() -> int:
    """Of all tensors on which a gradient is computed."""
    tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
    return sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)


def test_cancel_while_paused_ends_the_run_resumably(trainer: Trainer) -> None:
    whole, _ = trainer(job(5), folder="whole")
    is_paused: list[bool] = []

    def cancel() -> None:
        if is_paused:
            raise Cancel

    with pytest.raises(Cancel):
        trainer(job(5), (2, "pause"), on_pause=lambda: is_paused.append(True), check_stop=cancel)
    assert trainer.states == ["training", "paused", "cancelled"]
    resumed, run = trainer(job(5))
    assert trainer.steps == [3, 4, 5]
    assert status(run).state == "finished"
    assert_same_lora(resumed, whole)


def test_stop_while_paused_keeps_the_run_without_another_step(trainer: Trainer) -> None:
    trained, run, settings = paused_and_asked(trainer, 2, "stop")
    assert trainer.states == ["training", "paused", "stopped"]
    assert (trainer.steps, trained.step) == ([1, 2], 2)
    assert all(torch.equal(trained.lora[name], t) for name, t in run.load(2).adapter.items())
    again, _ = trainer(settings)
    assert (trainer.steps, again.step) == ([], 2)


def test_stop_while_paused_still_measures_the_end(trainer: Trainer) -> None:
    hooks = {"held_out": trainer.data, "validation": Rhythm(every=0, at_start=False)}
    _, run, _ = paused_and_asked(trainer, 2, "stop", **hooks)
    assert trainer.steps == [1, 2]
    assert list(run.eval_losses()) == [2]
    assert status(run).state == "stopped"


def test_stop_while_a_picture_is_drawn_still_measures_the_end(trainer: Trainer) -> None:
    """Nothing is due at that step: the picture was asked for."""
    control = Control()

    def draw(step: int, lora: dict[str, torch.Tensor]) -> None:
        control.request("stop")

    hooks = {"held_out": trainer.data, "validation": Rhythm(every=0, at_start=False)}
    _, run = trainer(job(5), (2, "sample"), control=control, sample=draw, **hooks)
    assert trainer.steps == [1, 2]
    assert list(run.eval_losses()) == [2]


def test_stop_while_paused_before_the_first_step_waits_for_it(trainer: Trainer) -> None:
    trained, _, _ = paused_and_asked(trainer, 0, "stop")
    assert (trainer.steps, trained.step) == ([1], 1)
    assert trainer.states == ["training", "paused", "training", "stopped"]


def test_the_device_is_given_back_and_taken_again(trainer: Trainer) -> None:
    calls: list[str] = []
    paused_and_asked(
        trainer,
        2,
        "resume",
        on_pause=lambda: calls.append("given back"),
        take_device=lambda: calls.append("taken"),
    )
    assert calls == ["taken", "given back", "taken"]


def test_save_now_writes_a_checkpoint_and_the_lora_file(trainer: Trainer) -> None:
    plain, _ = trainer(job(4), folder="plain")
    kept: list[Path] = []
    settings = job(4)
    made = open_run(trainer.root / "runs", settings, trainer.base, trainer.data)

    def keep(trained: Trained) -> None:
        kept.append(save_trained(trainer.root / "loras", trained, made, trainer.base))

    trained, run = trainer(settings, (2, "save"), (2, "save"), keep=keep)
    assert [path.name for path in kept] == [f"{run.name}-2.safetensors"]
    assert run.steps_saved() == [2, 4]
    assert status(run).lora == kept[0].name
    assert_same_lora(trained, plain)


def test_a_saved_lora_is_still_known_after_the_run_was_cancelled(trainer: Trainer) -> None:
    settings = job(4)
    made = open_run(trainer.root / "runs", settings, trainer.base, trainer.data)

    def keep(trained: Trained) -> None:
        save_trained(trainer.root / "loras", trained, made, trainer.base)

    def cancel() -> None:
        if trainer.steps == [1, 2, 3]:
            raise Cancel

    with pytest.raises(Cancel):
        trainer(settings, (2, "save"), keep=keep, check_stop=cancel)
    assert (status(made).state, status(made).lora) == ("cancelled", f"{made.name}-2.safetensors")
    trainer(settings, (3, "stop"))
    assert status(made).lora == f"{made.name}-2.safetensors"


def test_sample_now_draws_once_with_the_weights_of_the_step(trainer: Trainer) -> None:
    plain, _ = trainer(job(4), folder="plain")
    drawn: dict[int, dict[str, torch.Tensor]] = {}

    def draw(step: int, lora: dict[str, torch.Tensor]) -> None:
        assert step not in drawn
        drawn[step] = lora

    trained, run = trainer(job(4), (2, "sample"), (2, "sample"), (2, "save"), sample=draw)
    assert list(drawn) == [2]
    assert all(torch.equal(drawn[2][name], t) for name, t in run.load(2).adapter.items())
    assert status(run).can_sample
    assert_same_lora(trained, plain)


@pytest.mark.parametrize("what", REQUESTS)
def test_a_request_made_twice_counts_once(what: Request) -> None:
    control = Control()
    assert not control.take(what)
    control.request(what)
    control.request(what)
    assert control.is_asked(what)
    assert control.take(what)
    assert not control.is_asked(what)
    assert not control.take(what)


@pytest.mark.parametrize("first", ["pause", "resume"])
def test_of_pause_and_resume_the_last_one_counts(first: Request) -> None:
    """A second click on Resume must not undo the next Pause."""
    last: Request = "resume" if first == "pause" else "pause"
    control = Control()
    control.request(first)
    control.request(last)
    assert not control.is_asked(first)
    assert control.is_asked(last)


def test_a_run_that_was_not_paused_pauses_after_a_resume_that_came_too_late(
    trainer: Trainer,
) -> None:
    control = Control()
    control.request("resume")
    settings = job(4)
    made = open_run(trainer.root / "runs", settings, trainer.base, trainer.data)
    ask_when_paused(control, made, "resume", "resume")
    trainer(settings, (1, "pause"), control=control)
    assert trainer.states == ["training", "paused", "training", "finished"]


def test_waiting_ends_soon_after_the_request() -> None:
    control = Control()
    threading.Timer(0.3, control.request, ("resume",)).start()
    looked: list[float] = []
    began = time.monotonic()
    control.wait_while_paused(lambda: looked.append(time.monotonic()))
    assert 0.25 < time.monotonic() - began < 5
    assert looked
    assert not control.is_asked("resume")
