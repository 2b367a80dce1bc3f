"""A training that is killed, again and again, loses steps at most, and ends as an unbroken one.

The process is killed from outside at a random moment of what it is seen to do on disk. Thirty times
by `python scripts/dev.py test -m slow tests/host/test_kill.py --log-cli-level INFO`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
from atelier.trainers.history import run_summary
from killed_training import CHECKPOINT_EVERY, JOBS, LOOK_EVERY, NUM_STEPS
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
logger = logging.getLogger(__name__)
COMFYUI = Path(folder_paths.__file__).parent
SCRIPT = Path(__file__).parents[1] / "support" / "killed_training.py"
AIMS = ("start", "step", "checkpoint", "evaluation", "sampling")
LAST_AIMS = ("end", "LoRA file")
LONGEST_S = {
    "start": 1.5,
    "step": 0.12,
    "checkpoint": 0.01,
    "evaluation": 0.05,
    "sampling": 0.15,
    "end": 0.25,
    "LoRA file": 0.03,
}
"""The kill falls within this time of the beginning of what is aimed at: about what it takes."""


class Processes:
    """Starts the processes that train, one at a time."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            command = [sys.executable, "-P", str(SCRIPT), str(COMFYUI)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._parent = subprocess.Popen(command, stderr=file, text=True, **pipes)

    def start(self, training: Training) -> int:
        """The id of a process that trains in its folder."""
        self._parent.stdin.write(f"{training.job} {training.base}\n")
        self._parent.stdin.flush()
        return self._answer("started")

    def end(self) -> int:
        """Wait for it; 0 if all went well."""
        return self._answer("ended")

    def finish(self, training: Training) -> None:
        self.start(training)
        assert self.end() == 0, self.log.read_text()

    def close(self) -> None:
        self._parent.communicate()

    def _answer(self, expected: str) -> int:
        said, _, number = self._parent.stdout.readline().partition(" ")
        assert said == expected, self.log.read_text()
        return int(number)


class Training:
    """What a folder shows of the run of a job of `JOBS` that is trained in it."""

    def __init__(self, base: Path, job: str) -> None:
        self.job, self.base, self.root, self.loras = (
            job,
            base,
            base / "output/atelier",
            base / "output/loras",
        )

    @property
    def folder(self) -> Path:
        return next(self.root.glob("killed-*"), self.root / "none yet")

    def lines(self) -> list[dict]:
        """Of the metrics, without the one that is being written."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]

    def step(self) -> int:
        return max((line["step"] for line in self.lines() if "loss" in line), default=0)

    def saved(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.folder.glob("checkpoints/step-*"))

    def is_finished(self) -> bool:
        status = self.folder / "status.json"
        return status.exists() and json.loads(status.read_text())["state"] == "finished"

    def is_measured(self) -> bool:
        return any("eval_loss" in line and line["step"] == self.step() for line in self.lines())

    def is_drawn(self) -> bool:
        return any(self.folder.glob(f"samples/step-{self.step():06d}-*.png"))

    def files(self) -> list[Path]:
        """All that are whole: what is being written has a name that starts with a dot."""
        files = [path for path in self.base.glob("output/**/*") if path.is_file()]
        names = {path: path.relative_to(self.base).parts for path in files}
        return sorted(path for path in files if not any(n.startswith(".") for n in names[path]))

    def unfinished(self) -> set[Path]:
        """What is being written now, or was when a process was killed."""
        return set(self.folder.glob("**/.*.tmp")) | set(self.loras.glob(".*.tmp"))

    def doing(self, before: set[Path]) -> str:
        """What the process does, as far as the files tell, if `before` is what others left."""
        written = self.unfinished() - before
        if before & self.unfinished() or not self.folder.exists():
            return "start"
        if any(path.name.startswith(".step-") for path in written):
            return "checkpoint"
        if written:
            return f"writing {min(written).name}"
        is_due = self.step() % LOOK_EVERY == 0
        if is_due and not self.is_measured():
            return "evaluation"
        if self.step() == NUM_STEPS and not any(self.loras.glob("*")):
            return "end"
        if is_due and not self.is_drawn():
            return "sampling"
        return "end" if self.step() == NUM_STEPS else "step"


def kill(processes: Processes, training: Training, aim: str, chance: random.Random) -> str:
    """Let the training go on, and kill it at a random moment of what is aimed at; returns what was
    killed, as far as the files tell."""
    began, before = training.step(), training.unfinished()
    at_least = min(began + chance.randint(1, 4), NUM_STEPS - 1)
    process = processes.start(training)
    if aim != "start":
        while not is_doing(training, aim, at_least):
            assert is_running(process) or processes.end() is None, "it ended by itself"
            time.sleep(0.0005)
    time.sleep(chance.uniform(0, LONGEST_S[aim]))
    os.kill(process, signal.SIGKILL)
    assert processes.end() == signal.SIGKILL
    return training.doing(before)


def is_doing(training: Training, aim: str, at_least: int) -> bool:
    """Whether what is aimed at has begun, after so many steps."""
    if aim == "LoRA file":
        return training.is_finished()  # what is written next
    step = training.step()
    is_begun = {
        "step": lambda: True,
        "checkpoint": lambda: any(training.folder.glob("checkpoints/.step-*")),
        "evaluation": lambda: step % LOOK_EVERY == 0 and not training.is_measured(),
        "sampling": lambda: training.is_measured() and not training.is_drawn(),
        "end": lambda: step == NUM_STEPS,
    }
    return step >= at_least and is_begun[aim]()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def assert_readable(training: Training) -> None:
    """By the libraries that made the formats."""
    for path in training.files():
        if path.suffix == ".safetensors":
            assert load_file(path)
        elif path.suffix == ".json":
            assert json.loads(path.read_text())
        elif path.suffix == ".png":
            Image.open(path).load()
        else:
            assert path.name in ("metrics.jsonl", "lock")
    assert all(training.lines())
    for checkpoint in training.folder.glob("checkpoints/step-*"):
        names = {path.name for path in checkpoint.iterdir()}
        assert names == {"adapter.safetensors", "optimizer.safetensors", "state.json"}


def contents(training: Training) -> dict[str, Any]:
    """Of every file that depends on what was computed alone."""
    own = ("metrics.jsonl", "status.json", "job.json", "lock")  # times, and paths of the folder
    root = training.base / "output"
    files = [path for path in training.files() if path.name not in own]
    return {path.relative_to(root).as_posix(): content(path) for path in files}


def content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    # The library writes the metadata in any order.
    begin = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:begin]), data[begin:]


def state(training: Training) -> str:
    """As the list of runs shows it."""
    if not (training.folder / "run.json").exists():
        return "interrupted"  # before there was anything to show
    return run_summary(training.root, training.folder.name)["state"]


def curves(training: Training) -> list[dict]:
    own = ("seconds", "memory", "ram")
    return [{n: v for n, v in line.items() if n not in own} for line in training.lines()]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes") / "log.txt")
    yield started
    started.close()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Training]]:
    """The training of a job, of other processes, in which Python's hashes are others too."""
    others = Processes(tmp_path_factory.mktemp("others") / "log.txt")

    @functools.cache
    def train(job: str) -> Training:
        training = Training(tmp_path_factory.mktemp(job), job)
        others.finish(training)
        return training

    yield train
    others.close()


def test_the_state_of_the_optimizer_has_eight_bits(unbroken: Callable[[str], Training]) -> None:
    folder = unbroken(QUICK).folder / f"checkpoints/step-{NUM_STEPS:06d}"
    state = load_file(folder / "optimizer.safetensors")
    kept = [state[name] for name in state if name.endswith(("state1", "state2"))]
    large = [tensor for tensor in kept if tensor.numel() >= 4096]  # bitsandbytes leaves small ones
    assert large
    assert {str(tensor.dtype) for tensor in large} == {"torch.uint8"}


def shuffled(seed: int) -> tuple[str, ...]:
    return (*random.Random(seed).sample(AIMS, 4), LAST_AIMS[seed % 2])


QUICK, *_ = NAMES = tuple(JOBS)
ROUNDS = [
    pytest.param(0, QUICK, ("step", "checkpoint", "sampling"), id=f"three-{QUICK}"),
    *(
        pytest.param(seed, name, shuffled(seed), marks=pytest.mark.slow, id=f"five-{seed}-{name}")
        for seed, name in zip(range(1, 7), 2 * NAMES, strict=True)
    ),
]


@pytest.mark.parametrize(("seed", "job", "aims"), ROUNDS)
def test_a_killed_training_ends_as_an_unbroken_one(
    processes: Processes,
    unbroken: Callable[[str], Training],
    tmp_path: Path,
    seed: int,
    job: str,
    aims: tuple[str, ...],
) -> None:
    chance, training, whole = random.Random(seed), Training(tmp_path, job), unbroken(job)
    for aim in aims:
        killed = kill(processes, training, aim, chance)
        kept = training.saved()[-1] if training.saved() else 0
        lost = training.step() - kept
        logger.info("aimed at %s, killed %s; lost %d of %d", aim, killed, lost, training.step())
        assert_readable(training)
        assert 0 <= lost <= CHECKPOINT_EVERY
        assert state(training) in ("interrupted", "finished" if aim in LAST_AIMS else None)
    processes.finish(training)
    assert state(training) == "finished"
    assert curves(training) == curves(whole)
    mine, expected = contents(training), contents(whole)
    assert mine.keys() == expected.keys()
    assert [name for name in mine if mine[name] != expected[name]] == []
    assert not any(training.folder.glob("checkpoints/.*"))
