"""status.json: through all states of a run, damaged, and of another version."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from atelier.trainers import status as status_file
from atelier.trainers.data import TrainingData
from atelier.trainers.hooks import Hooks, Step
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.loop import open_run, train
from atelier.trainers.run import Run
from atelier.trainers.status import STATES, Status, read_status, write_status
from flux_files import write_flux
from runs import job
from training import training_data

RUNNING = Status(state="training", step=2, num_steps=5, started=1.5, updated=2.5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedFlux:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")
    return load_flux(path, format="nf4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("caches"))


def text(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "status.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("state", STATES)
def test_every_state_is_read_as_it_was_written(tmp_path: Path, state: Any) -> None:
    written = RUNNING.changed(state=state, error="Too bad.", lora="a.safetensors", node="12")
    write_status(tmp_path, written)
    assert read_status(tmp_path) == written
    keys = {"state", "step", "num_steps", "started", "updated", "error", "lora", "node"}
    assert json.loads((tmp_path / "status.json").read_text()).keys() == keys | {
        "can_sample",
        "went_on",
    }


def test_a_change_has_its_time() -> None:
    before = time.time()
    changed = RUNNING.changed(state="paused")
    assert before <= changed.updated <= time.time()
    assert (changed.state, changed.step, changed.started) == ("paused", 2, 1.5)


def test_a_run_without_a_status_is_of_an_older_version(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None


DAMAGED = ["", "{", "[]", "null", "{}", '{"state": "training"}', "\x00\x00", '"training"']


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_status_is_one_sentence(tmp_path: Path, damage: str) -> None:
    (tmp_path / "status.json").write_text(damage, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^The file '.*status\.json' cannot be read as the state"):
        read_status(tmp_path)


@pytest.mark.parametrize("change", [{"step": None}, {"updated": "today"}, {"more": 1}], ids=str)
def test_a_status_with_other_values_is_one_sentence(tmp_path: Path, change: dict) -> None:
    write_status(tmp_path, RUNNING)
    values = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(values | change), encoding="utf-8")
    with pytest.raises(ValueError, match=r"Delete it: the run then goes on from its last checkpo"):
        read_status(tmp_path)


@pytest.mark.parametrize("state", ["dreaming", None, ["training"], {}], ids=str)
def test_an_unknown_state_is_one_sentence(tmp_path: Path, state: Any) -> None:
    write_status(tmp_path, RUNNING)
    values = json.loads((tmp_path / "status.json").read_text())
    (tmp_path / "status.json").write_text(json.dumps(values | {"state": state}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"is in a state that this version does not know: .*Take"):
        read_status(tmp_path)


def test_a_status_that_was_deleted_as_it_says_lets_the_run_go_on(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    run = open_run(tmp_path, job(3), base, data)
    train(run, base, data, job(2))
    (run.folder / "status.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read as the state of a run"):
        train(run, base, data, job(3))
    assert run.steps_saved() == [2]
    (run.folder / "status.json").unlink()
    assert train(run, base, data, job(3)).step == 3
    assert text(run)["state"] == "finished"


def test_the_states_of_a_run_are_told_and_written_at_the_same_time(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    run = open_run(tmp_path, job(2), base, data)
    told: list[Status] = []

    def on_status(status: Status) -> None:
        assert read_status(run.folder) == status
        told.append(status)

    before = time.time()
    train(run, base, data, job(2), Hooks(on_status=on_status, node="7", sample=lambda *_: None))
    assert [(status.state, status.step) for status in told] == [("training", 0), ("finished", 2)]
    assert {(status.num_steps, status.node, status.can_sample) for status in told} == {
        (2, "7", True)
    }
    assert before <= told[0].started == told[1].started <= told[0].updated <= told[1].updated


def test_it_is_written_at_changes_only(
    tmp_path: Path, base: LoadedFlux, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    original = status_file.write_json
    monkeypatch.setattr(
        status_file, "write_json", lambda path, value: written.append(path) or original(path, value)
    )
    train(open_run(tmp_path, job(6), base, data), base, data, job(6))
    assert len(written) == 2


@pytest.mark.parametrize(
    ("error", "state", "sentence"),
    [
        (ValueError("It is too wide. Make it smaller."), "failed", "It is too wide. Make it small"),
        (RuntimeError("broken"), "failed", "RuntimeError: broken"),
        (KeyboardInterrupt(), "cancelled", None),
    ],
    ids=str,
)
def test_why_a_run_ended_is_written(
    tmp_path: Path,
    base: LoadedFlux,
    data: TrainingData,
    error: BaseException,
    state: str,
    sentence: str | None,
) -> None:
    def fail(step: Step) -> None:
        if step.step == 2:
            raise error

    run = open_run(tmp_path, job(4), base, data)
    with pytest.raises(type(error)):
        train(run, base, data, job(4), Hooks(on_step=fail))
    found = text(run)
    assert (found["state"], found["step"], found["num_steps"]) == (state, 2, 4)
    assert found["error"] == sentence if sentence is None else found["error"].startswith(sentence)
    assert run.steps_saved() == [2]
    train(run, base, data, job(4))
    assert (text(run)["state"], text(run)["error"]) == ("finished", None)


def test_the_host_has_its_own_words_for_an_error(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    def fail(_: Step) -> None:
        raise RuntimeError("CUDA out of memory")

    hooks = Hooks(on_step=fail, explain=lambda error: f"Not enough memory ({error}).")
    run = open_run(tmp_path, job(4), base, data)
    with pytest.raises(RuntimeError):
        train(run, base, data, job(4), hooks)
    assert text(run)["error"] == "Not enough memory (CUDA out of memory)."


def test_the_lora_file_is_noted_and_nothing_else_changes(
    tmp_path: Path, base: LoadedFlux, data: TrainingData
) -> None:
    run = open_run(tmp_path, job(1), base, data)
    assert run.lora_name() is None
    run.note_lora("early.safetensors", 1)  # there is no run yet, and none is made
    assert not run.folder.exists()
    train(run, base, data, job(1))
    before = text(run)
    assert before["lora"] is None
    run.note_lora("test-0.safetensors", 0)  # a shorter answer
    assert text(run) == before
    run.note_lora("test-1.safetensors", 1)
    after = text(run)
    assert run.lora_name() == "test-1.safetensors"
    assert after == before | {"lora": "test-1.safetensors", "updated": after["updated"]}
    run.note_lora("test-1.safetensors", 1)
    assert text(run) == after


@pytest.mark.parametrize("done", [0, 2], ids=["new", "resumed"])
def test_a_device_that_cannot_be_taken_is_why_the_run_failed(
    tmp_path: Path, base: LoadedFlux, data: TrainingData, done: int
) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA out of memory")

    run = open_run(tmp_path, job(4), base, data)
    if done:
        train(run, base, data, job(done))
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        train(run, base, data, job(4), Hooks(take_device=refuse))
    found = text(run)
    assert (found["state"], found["step"], found["num_steps"]) == ("failed", done, 4)
    assert found["error"] == "RuntimeError: CUDA out of memory"
    assert train(run, base, data, job(4)).step == 4
