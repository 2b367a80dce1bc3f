"""A training without ComfyUI: `python -m trainers job.json`, its exit codes and its refusals."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from atelier.trainers import job as job_module
from atelier.trainers.config import JobSettings, Length, LoraSettings, TrainSettings
from atelier.trainers.job import read_job, run_job
from atelier.trainers.load import load_flux
from atelier.trainers.loop import Hooks, open_run
from flux_files import write_flux
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


def test_a_job_that_does_not_fit_is_refused_before_anything_is_written(
    job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match=r"^This training does not fit: .* and 0\.\d\d GB are"):
        run_job(read_job(job_file), tmp_path / "output", Hooks())
    assert not (tmp_path / "output").exists()
