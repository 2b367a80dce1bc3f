"""A run on disk: whole checkpoints or none, and an identity of what determines the weights."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from atelier.trainers import files, run
from atelier.trainers.config import JobSettings, Length, TrainSettings, job_from_json
from atelier.trainers.flow_settings import (
    FlowSettings,
    LossSettings,
    RolloutSettings,
    TimestepSettings,
)
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.optimizer_settings import OptimizerSettings
from atelier.trainers.run import Checkpoint, Run
from atelier.trainers.run_identity import RunIdentity
from atelier.trainers.speed_settings import SpeedSettings, routes_from_text
from atelier.trainers.status import State, Status
from safetensors import SafetensorError
from small_disk import fill, small_disk
from training import training_data, with_entries

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = RunIdentity(
    base="base", base_format="nf4", latents="latents", prompts="prompts", job=JobSettings()
)


def checkpoint(step: int, size: int = 8) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step,
        {"a": torch.randn(size, generator=generator)},
        {"0/state1": torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)},
        {"optimizer": {"0/step": step}, "scaler": {"scale": 1.5 * step}},
    )


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.step, one.values) == (other.step, other.values)
    for mine, theirs in ((one.adapter, other.adapter), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_run(root: Path) -> Run:
    run = Run(root, IDENTITY, {"model": "flux.safetensors"})
    run.create()
    return run


@pytest.fixture
def saved(tmp_path: Path) -> Run:
    """A run with a checkpoint at step 1."""
    made = open_run(tmp_path)
    made.save(checkpoint(1))
    return made


def test_runs_of_older_versions_are_found_again() -> None:
    job = JobSettings(train=TrainSettings(gradient_accumulation=1))
    # What it was before a base model could have LoRAs.
    assert dataclasses.replace(IDENTITY, job=job).hash8() == "39f8c118"
    # And before the optimizer had settings: jobs had the limit of gradients beside the others.
    values = {"train": {"gradient_accumulation": 1, "max_grad_norm": 0.5}}
    assert dataclasses.replace(IDENTITY, job=job_from_json(values)).hash8() == "4716f900"
    assert dataclasses.replace(IDENTITY, frozen="a").hash8() != IDENTITY.hash8()


def test_a_checkpoint_comes_back(saved: Run) -> None:
    assert_same(saved.load(1), checkpoint(1))


def test_a_run_opened_again_finds_its_checkpoints(saved: Run, tmp_path: Path) -> None:
    saved.save(checkpoint(12))
    saved.save(checkpoint(1_234_567))
    assert open_run(tmp_path).steps_saved() == [1, 12, 1_234_567]


def test_a_checkpoint_that_exists_is_kept(saved: Run) -> None:
    saved.save(dataclasses.replace(checkpoint(2), step=1))
    assert_same(saved.load(1), checkpoint(1))


def full_sync(patch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(files.os, "fsync", full)


def full_safetensors(patch: pytest.MonkeyPatch) -> None:
    """What the library's own code in Rust raises."""

    def full(*_: object, **__: object) -> None:
        text = 'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
        raise SafetensorError(f"Error while serializing: {text}")

    patch.setattr("safetensors.torch.save_file", full)


@pytest.mark.parametrize("break_disk", [full_sync, full_safetensors], ids=lambda f: f.__name__)
def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(
    saved: Run, monkeypatch: pytest.MonkeyPatch, break_disk: Callable
) -> None:
    with monkeypatch.context() as patch:
        break_disk(patch)
        with pytest.raises(
            ValueError, match=r"^The disk of .* is full\. Free some space and queue"
        ):
            saved.save(checkpoint(2))
    assert names(saved.folder / "checkpoints") == ["step-000001"]
    assert_same(saved.load(1), checkpoint(1))


@pytest.mark.parametrize("last", ["write_json", "write_safetensors"])
def test_a_crash_while_saving_leaves_the_checkpoint_before(
    saved: Run, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(run, last, crash)
        with pytest.raises(RuntimeError, match="crash"):
            saved.save(checkpoint(2))
    assert names(saved.folder / "checkpoints") == ["step-000001"]


def test_a_checkpoint_appears_at_once_when_all_of_it_is_written(
    saved: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, target: Path) -> None:
        assert names(folder) == ["adapter.safetensors", "optimizer.safetensors", "state.json"]
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(ValueError, match=r"^Cannot write .*step-000002: Input/output error\."):
            saved.save(checkpoint(2))
    assert names(saved.folder / "checkpoints") == ["step-000001"]


def test_what_a_killed_process_left_is_removed_when_the_run_is_opened(
    saved: Run, tmp_path: Path
) -> None:
    half = saved.folder / "checkpoints" / ".step-000002.77.tmp"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"half")
    (saved.folder / "samples").mkdir()
    (saved.folder / "samples" / ".step-000002.png.77.tmp").write_bytes(b"half")
    assert open_run(tmp_path).steps_saved() == [1]
    assert names(saved.folder / "checkpoints") == ["step-000001"]
    assert names(saved.folder / "samples") == []


def test_what_a_killed_process_left_of_a_file_goes_when_nobody_writes_it(tmp_path: Path) -> None:
    left = {name: tmp_path / name for name in (".a[1].json.77.tmp", ".a[1].json.78.tmp", "b.json")}
    for path in left.values():
        path.write_text("half")
    os.utime(left[".a[1].json.77.tmp"], (0, 0))
    os.utime(left["b.json"], (0, 0))
    files.clear_leftovers(tmp_path / "a[1].json")
    assert names(tmp_path) == [".a[1].json.78.tmp", "b.json"]


@pytest.mark.parametrize(
    ("state", "expected"),
    [("training", None), ("cancelled", None), ("failed", None), ("finished", 4), ("stopped", 4)],
)
def test_a_run_that_was_ended_at_its_last_step_is_not_finished(
    tmp_path: Path, state: State, expected: int | None
) -> None:
    """What belongs to the end, such as the loss on held out samples, may be missing."""
    made = open_run(tmp_path)
    made.save(checkpoint(4))
    status = Status(state=state, step=4, num_steps=4, started=0, updated=0)
    made.write_status(status)
    assert made.finished_at(4) == expected
    made.write_status(status.changed(num_steps=9))  # a longer training ended on its way
    assert made.finished_at(4) == 4


HOLD_THE_LOCK = """
import sys
from pathlib import Path
from pack import load_pack
load_pack()
from atelier.trainers.config import JobSettings
from atelier.trainers.run import Run
from atelier.trainers.run_identity import RunIdentity
names = ("base", "base_format", "latents", "prompts")
identity = RunIdentity(**dict.fromkeys(names, "x"), job=JobSettings())
with Run(Path(sys.argv[1]), identity, {}).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["ends", "is killed"])
def test_a_run_is_locked_until_the_process_that_trains_it(tmp_path: Path, end: str) -> None:
    names = ("base", "base_format", "latents", "prompts")
    mine = Run(tmp_path, RunIdentity(**dict.fromkeys(names, "x"), job=JobSettings()), {})
    command = [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="is being trained by another process"):
            with mine.locked():
                pass
        if end == "is killed":
            other.kill()
        other.communicate()
    with mine.locked():
        assert mine.folder.is_dir()


def test_a_run_is_free_again_when_its_training_failed(saved: Run) -> None:
    with pytest.raises(RuntimeError, match="failed"), saved.locked():
        raise RuntimeError("failed")
    with saved.locked():
        pass


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_one_sentence(saved: Run, name: str, damage: str) -> None:
    path = saved.folder / "checkpoints" / "step-000001" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        path.unlink()
    with pytest.raises(ValueError, match=r"^The checkpoint '.*step-000001' is damaged\. Delete"):
        saved.load(1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_really_full_disk_leaves_the_checkpoint_before(disk: Path) -> None:
    made = open_run(disk)
    made.save(checkpoint(1))
    with pytest.raises(ValueError, match=r"^The disk of .* is full\. Free some space and queue"):
        made.save(checkpoint(2, size=1 << 20))
    assert names(made.folder / "checkpoints") == ["step-000001"]
    assert_same(made.load(1), checkpoint(1))
    made.save(checkpoint(3))
    assert made.steps_saved() == [1, 3]


def log_until_full(made: Run) -> tuple[int, str]:
    """Lines written before the disk refused one, and what it then said."""
    for count in range(10_000):  # the last page of the file has room for some
        try:
            made.log({"step": 2 + count, "loss": 0.25})
        except ValueError as error:
            return count, str(error)
    raise AssertionError("the disk was never full")


def test_a_really_full_disk_keeps_the_metrics(disk: Path) -> None:
    made = open_run(disk)
    made.log({"step": 1, "loss": 0.5})
    filler = fill(disk)
    count, message = log_until_full(made)
    filler.unlink()
    assert message.startswith(f"The disk of {made.folder} is full. Free some space and queue")
    assert [line["step"] for line in made.metrics()] == list(range(1, count + 2))


def test_a_new_run_on_a_really_full_disk_is_one_sentence(disk: Path) -> None:
    fill(disk)
    with pytest.raises(ValueError, match=r"^The disk of .* is full\. Free some space and queue"):
        open_run(disk)


def test_metrics_come_back_in_order(saved: Run) -> None:
    lines = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for line in lines:
        saved.log(line)
    assert saved.metrics() == lines


def test_a_line_that_a_crash_cut_is_left_out(saved: Run) -> None:
    saved.log({"step": 1, "loss": 0.5})
    with (saved.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert saved.metrics() == [{"step": 1, "loss": 0.5}]


def test_a_resumed_run_writes_after_a_cut_line(saved: Run) -> None:
    test_a_line_that_a_crash_cut_is_left_out(saved)
    saved.forget_metrics_after(1)
    saved.log({"step": 2, "loss": 0.25})
    assert [line["step"] for line in saved.metrics()] == [1, 2]


def test_forgetting_drops_the_steps_that_will_be_repeated(saved: Run) -> None:
    for step in range(1, 6):
        saved.log({"step": step, "loss": 1.0})
    saved.forget_metrics_after(3)
    assert [line["step"] for line in saved.metrics()] == [1, 2, 3]


def test_a_full_disk_while_forgetting_keeps_every_line(
    saved: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 4):
        saved.log({"step": step, "loss": 1.0})
    with monkeypatch.context() as patch:
        full_sync(patch)
        with pytest.raises(ValueError, match=r"^The disk of .* is full"):
            saved.forget_metrics_after(1)
    assert [line["step"] for line in saved.metrics()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("steps_saved", "asked", "expected"),
    [
        ([], 10, 0),
        ([4], 4, 4),
        ([4], 10, 4),
        ([2, 4], 10, 4),
        ([2, 4], 2, 2),
    ],
)
def test_where_a_run_begins(
    tmp_path: Path, steps_saved: list[int], asked: int, expected: int
) -> None:
    made = open_run(tmp_path)
    for step in steps_saved:
        made.save(checkpoint(step))
    assert made.start_step(asked) == expected


def test_fewer_steps_without_a_checkpoint_name_those_that_there_are(saved: Run) -> None:
    saved.save(checkpoint(4))
    with pytest.raises(
        ValueError, match=r"^This run already has 4 steps .* at 3\. Ask for one of 1, 4"
    ):
        saved.start_step(3)


def test_two_runs_of_one_identity_share_a_folder(tmp_path: Path) -> None:
    assert open_run(tmp_path).folder == open_run(tmp_path).folder


def test_a_run_that_is_only_looked_at_leaves_nothing(tmp_path: Path) -> None:
    assert Run(tmp_path, IDENTITY, {}).start_step(5) == 0
    assert names(tmp_path) == []


def test_the_job_file_holds_what_was_given(saved: Run) -> None:
    assert json.loads((saved.folder / "job.json").read_text()) == {"model": "flux.safetensors"}


def test_the_run_file_holds_all_that_the_hash_is_over(saved: Run) -> None:
    assert json.loads((saved.folder / "run.json").read_text()) == IDENTITY.to_json()


def job(**change: object) -> dict[str, object]:
    return {"job": dataclasses.replace(JobSettings(), **change)}  # pyright: ignore


def train(**change: object) -> dict[str, object]:
    return job(train=TrainSettings(**change))  # pyright: ignore


@pytest.mark.parametrize(
    "change",
    [
        {"base": "another"},
        {"base_format": "bf16"},
        {"latents": "another"},
        {"prompts": "another"},
        job(lora=LoraSettings(rank=8)),
        job(lora=LoraSettings(alpha=2.0)),
        job(lora=LoraSettings(targets="all")),
        train(learning_rate=2e-4),
        train(batch_size=2),
        train(gradient_accumulation=2),
        train(guidance=2.0),
        train(optimizer=OptimizerSettings(clip_limit=2.0)),
        train(optimizer=OptimizerSettings(optimizer="adamw")),
        train(optimizer=OptimizerSettings(ema_decay=0.9)),
        {"num_steps": 700},
        train(compute_dtype="fp32"),
        train(seed=1),
        train(flow=FlowSettings(timesteps=TimestepSettings(auto_shift=True))),
        train(flow=FlowSettings(loss=LossSettings(weight="cosmap"))),
        train(flow=FlowSettings(noise_offset=0.1)),
        train(flow=FlowSettings(guidance_max=4.0)),
        train(flow=FlowSettings(bypass_guidance=True)),
        train(flow=FlowSettings(rollout=RolloutSettings(max_offset=5))),
        train(speed=SpeedSettings(tread=routes_from_text("0.5: 2 to -2"))),
        train(speed=SpeedSettings(products="8bit")),
    ],
    ids=str,
)
def test_what_changes_the_weights_changes_the_run(change: dict) -> None:
    assert dataclasses.replace(IDENTITY, **change).hash8() != IDENTITY.hash8()


@pytest.mark.parametrize(
    "change",
    [
        job(name="another"),
        job(length=Length(amount=5)),
        job(checkpoint_every=5),
        job(lora=LoraSettings(alpha=4.0)),  # what no alpha means at rank 4
        train(gradient_checkpointing=False),
        train(speed=SpeedSettings(checkpointing="selective", compile=True)),
        train(speed=SpeedSettings(checkpointing="interval", checkpointing_interval=4)),
    ],
    ids=str,
)
def test_what_does_not_change_the_weights_does_not_change_the_run(change: dict) -> None:
    assert dataclasses.replace(IDENTITY, **change).hash8() == IDENTITY.hash8()


@pytest.mark.parametrize(
    "change",
    [{"texts": (("another",),)}, {"keys": ("another",)}, {"repeats": 2}, {"dropout": 0.1}],
    ids=["texts", "keys", "repeats", "dropout"],
)
def test_the_run_follows_what_is_in_the_latent_cache(
    tmp_path: Path, change: dict[str, object]
) -> None:
    cache = training_data(tmp_path).latents
    entries = (dataclasses.replace(cache.entries[0], **change), *cache.entries[1:])
    changed = with_entries(cache, entries)
    assert changed.fingerprint() != cache.fingerprint()


def test_the_run_follows_neither_the_folder_nor_the_order_of_the_cache(tmp_path: Path) -> None:
    cache = training_data(tmp_path).latents
    moved = dataclasses.replace(with_entries(cache, cache.entries[::-1]), folder="/elsewhere")
    assert moved.fingerprint() == cache.fingerprint()


def test_a_file_that_is_being_read_is_replaced_when_the_reader_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to replace a file that is open; here the first two tries are refused."""
    replace, refusals = Path.replace, iter([True, True])

    def refuse(path: Path, target: Path) -> Path:
        if next(refusals, False):
            raise PermissionError(errno.EACCES, "The file is used by another process")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    files.write_json(tmp_path / "status.json", {"step": 1})
    assert names(tmp_path) == ["status.json"]
