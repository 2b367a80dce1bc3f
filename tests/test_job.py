"""A training without ComfyUI: `python -m trainers job.json`, its exit codes and its refusals."""

from __future__ import annotations

import dataclasses
import itertools
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from atelier.trainers import job as job_module
from atelier.trainers.config import STREAMING, JobSettings, Length, TrainSettings
from atelier.trainers.hooks import Hooks
from atelier.trainers.job import read_job, run_job
from atelier.trainers.load import load_flux
from atelier.trainers.loop import open_run
from atelier.trainers.lora_settings import LoraSettings
from flux_files import write_flux
from torch.overrides import TorchFunctionMode
from training import training_data

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """The job.json that a run leaves; it would train for hours."""
    base = load_flux(write_flux(tmp_path / "flux.safetensors"), format="bf16")
    settings = JobSettings(
        name="job",
        length=Length(amount=100_000),
        lora=LoraSettings(rank=4),
        train=TrainSettings(compute_dtype="fp32"),
    )
    run = open_run(tmp_path / "runs", settings, base, training_data(tmp_path / "caches"))
    run.create()
    return run.folder / "job.json"


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trainers", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to whole consoles only")
def test_ctrl_c_saves_and_the_same_command_goes_on(job_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    first_steps = []
    for _ in range(2):
        process = start(job_file, "--output", output)
        assert process.stderr is not None
        steps = (line for line in process.stderr if line.startswith("step "))
        first_steps.append(int(next(steps).removeprefix("step ").partition("/")[0]))
        process.send_signal(signal.SIGINT)
        *_, last = process.stderr
        assert process.wait() == 130
        assert last == "Stopped and saved. The same command goes on from here.\n"
    assert first_steps[0] == 1
    assert first_steps[1] > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"The job file '.*wrong\.json' does not exist\. Every run of Train LoRA has one: "),
        ("{}", r"'wrong\.json' is not a job file: KeyError\('model'\)\. Take the job\.json of a "),
    ],
    ids=["missing", "no job"],
)
def test_a_wrong_job_file_is_one_sentence_and_exit_code_1(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as refused:
        read_job(path)
    process = start(path)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines()[-1] == str(refused.value)
    assert "Traceback" not in errors


OTHER_DEVICE = torch.device("cpu", 0)


class Recorded(TorchFunctionMode):
    """Notes when weights are moved to the second device; quantizing there is no move."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and OTHER_DEVICE in args[1:]:
            self._events.append("moved")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("streaming", STREAMING)
@pytest.mark.parametrize("fits", [True, False], ids=["fits", "does not fit"])
def test_weights_go_to_the_device_when_they_are_known_to_fit(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: str, fits: bool
) -> None:
    job = read_job(job_file)
    length = dataclasses.replace(job.settings, length=Length(amount=1))
    job = dataclasses.replace(job, settings=length, block_streaming=streaming)
    events: list[str] = []
    hooks = Hooks(
        before_start=lambda: events.append("checked"),
        on_start=lambda step, num_steps: events.append("started"),
        on_step=lambda step: events.append("step"),
    )
    monkeypatch.setattr(job_module, "default_device", lambda: OTHER_DEVICE)
    monkeypatch.setattr(job_module, "free_bytes", lambda device: 10**12 if fits else 0)
    with Recorded(events), nullcontext() if fits else pytest.raises(ValueError, match="not fit"):
        run_job(job, tmp_path / "output", hooks)
    kinds = [kind for kind, _ in itertools.groupby(events)]
    assert kinds[:1] == ["checked"]
    assert kinds == (["checked", "started", "moved", "step"] if fits else ["checked"])


def test_a_job_that_does_not_fit_is_refused_before_anything_is_written(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match=r"^This training does not fit: .* and 0\.\d\d GB are"):
        run_job(read_job(job_file), tmp_path / "output", Hooks())
    assert not (tmp_path / "output").exists()
