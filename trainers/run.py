"""One run on disk: its identity, its checkpoints, its metrics. Nothing here computes.

`<root>/<name>-<hash8>/` holds `run.json`, `job.json`, `status.json`, `metrics.jsonl`,
`checkpoints/step-000250/` and, if the base model has LoRAs or its training an assistant,
`frozen_loras.safetensors` and `assistant_loras.safetensors`. A checkpoint is written under a
temporary name, synced and renamed, so it is whole or not there. `lock` is held by the process that
trains, and free when that is gone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout  # a package that torch needs
from torch import Tensor

from .files import (
    not_written,
    read_safetensors,
    sync_folder,
    write_atomically,
    write_json,
    write_safetensors,
)
from .frozen import FrozenLora, save_frozen
from .lora_settings import LoraSettings
from .run_identity import RunIdentity
from .status import Status, read_status, write_status

RUN_FILE, LOCK_FILE = "run.json", "lock"
PROMPT_FILE = "prompt.json"
"""The graph that asked for the run, as ComfyUI's queue takes it, and the id of its node."""
FROZEN_FILE, ASSISTANT_FILE = "frozen_loras.safetensors", "assistant_loras.safetensors"
_CHECKPOINT_NAME = re.compile(r"step-(\d{6,})")


def run_name(run_id: str) -> str:
    """The name in `<name>-<hash8>`."""
    return run_id.rpartition("-")[0] or run_id


def steps_saved(folder: Path) -> list[int]:
    """The steps of which the run in `folder` has a checkpoint, ascending."""
    try:
        names = [path.name for path in (folder / "checkpoints").iterdir()]
    except OSError:  # there are none, or the run is being deleted
        return []
    matches = map(_CHECKPOINT_NAME.fullmatch, names)
    return sorted(int(match.group(1)) for match in matches if match)


def adapter_file(folder: Path, step: int) -> Path:
    """The file with the LoRA's tensors of a checkpoint of the run in `folder`."""
    return folder / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors"


def lora_settings(folder: Path) -> LoraSettings:
    """What kind of LoRA the run in `folder` trains.

    Raises:
        ValueError: its run.json is gone or damaged.
    """
    try:
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return LoraSettings(**values["lora"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"The run {folder.name} cannot be read: its {RUN_FILE} is gone or damaged. Choose "
            "another one."
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps."""

    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    values: dict[str, Any]
    """JSON values: the compute dtype, those of the optimizer's state and the gradient scaler's."""


class Run:
    """A run folder. It is made by `create`, when training really begins.

    Args:
        root: the folder of all runs.
        job: what `python -m trainers` needs to train the same, as JSON values.
        loras: those that it needs too, of the base model and of its training, by their files.
    """

    def __init__(
        self,
        root: Path,
        identity: RunIdentity,
        job: dict[str, Any],
        loras: Mapping[str, Sequence[FrozenLora]] = MappingProxyType({}),
    ) -> None:
        self.identity = identity
        self._job, self._loras = job, loras
        self.name = f"{identity.job.name}-{identity.hash8()}"
        self.folder = root / self.name
        self._checkpoints = self.folder / "checkpoints"
        self._metrics = self.folder / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training this run, whose folder is made.

        The operating system holds the lock, so it is free again when the process is killed.

        Raises:
            ValueError: if another process trains this run, or the disk is full or refuses.
        """
        # Who lists the runs holds it for a moment, to see whether anybody trains.
        lock = FileLock(self.folder / LOCK_FILE, timeout=1)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"The run {self.name} is being trained by another process. Wait until that ends, "
                "or change the name for a run of its own."
            ) from None
        except OSError as error:
            raise not_written(self.folder, error) from error
        try:
            yield
        finally:
            lock.release()

    def create(self) -> None:
        """Make the folder, or clear away what a crash left in it. Call it with the lock.

        Raises:
            ValueError: if the disk is full or refuses.
        """
        try:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(self.folder, error) from error
        for leftover in [*self.folder.rglob(".*.tmp")]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
        write_json(self.folder / RUN_FILE, self.identity.to_json())
        write_json(self.folder / "job.json", self._job)
        for path, loras in ((self.folder / name, some) for name, some in self._loras.items()):
            if loras and not path.exists():  # what is in it is part of the run's identity
                save_frozen(path, loras)

    def steps_saved(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return steps_saved(self.folder)

    def start_step(self, num_steps: int) -> int:
        """Where a run to `num_steps` begins: 0, or the last checkpoint.

        Raises:
            ValueError: if the run is already longer and has no checkpoint at `num_steps`.
        """
        saved = self.steps_saved()
        if num_steps in saved or not saved:
            return num_steps if saved else 0
        if saved[-1] > num_steps:
            choices = ", ".join(str(step) for step in saved)
            raise ValueError(
                f"This run already has {saved[-1]} steps and no checkpoint at {num_steps}. "
                f"Ask for one of {choices}, for more steps, or change the seed for a new run."
            )
        return saved[-1]

    def finished_at(self, num_steps: int, *, go_on: bool = False) -> int | None:
        """The step whose checkpoint answers a training of `num_steps`: this one, or where it was
        stopped and kept on the way there, unless it shall go on. None if there is none, or if what
        comes after the last step was cut short.

        Raises:
            ValueError: if the run is already longer and has no checkpoint at `num_steps`.
        """
        saved, status = self.steps_saved(), read_status(self.folder)
        if status is not None and status.num_steps == num_steps:  # of this very training
            if status.state == "stopped" and status.step in saved and not go_on:
                return status.step
            if status.state not in ("finished", "stopped"):
                return None
        return num_steps if self.start_step(num_steps) == num_steps else None

    def is_going_on(self) -> bool:
        """Whether it was stopped and kept, now or once before."""
        status = read_status(self.folder)
        return status is not None and (status.state == "stopped" or status.went_on)

    def load(self, step: int) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            ValueError: if it is damaged.
        """
        folder = self._checkpoints / f"step-{step:06d}"
        try:
            adapter, _ = read_safetensors(adapter_file(self.folder, step))
            optimizer, _ = read_safetensors(folder / "optimizer.safetensors")
            values = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(
                f"The checkpoint '{folder}' is damaged. Delete this folder and queue again: "
                "the run goes on from the checkpoint before."
            ) from error
        return Checkpoint(step, adapter, optimizer, values)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, atomically; one that exists is kept.

        Raises:
            ValueError: if the disk is full. Earlier checkpoints are untouched.
        """
        final = self._checkpoints / f"step-{checkpoint.step:06d}"
        if final.exists():
            return
        temporary = self._checkpoints / f".step-{checkpoint.step:06d}.{os.getpid()}.tmp"
        try:
            temporary.mkdir()
            write_safetensors(temporary / "adapter.safetensors", checkpoint.adapter, {})
            write_safetensors(temporary / "optimizer.safetensors", checkpoint.optimizer, {})
            write_json(temporary / "state.json", checkpoint.values)
            temporary.rename(final)
            sync_folder(self._checkpoints)
        except OSError as error:
            raise not_written(final, error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def keep_checkpoints(self, last: int) -> None:
        """Remove all checkpoints but the last ones and the best; 0 keeps all."""
        spare = self.steps_saved()[:-last] if last else []
        best = self.best_step() if spare else None
        for step in spare:
            if step == best:
                continue
            # Renamed first, so that a crash leaves no half of one under its name.
            dropped = self._checkpoints / f".step-{step:06d}.dropped.tmp"
            (self._checkpoints / f"step-{step:06d}").rename(dropped)
            shutil.rmtree(dropped)

    def best_step(self) -> int | None:
        """The step with the smallest loss on the held out samples, the first of equal ones."""
        losses = self.eval_losses()
        return min(losses, key=losses.__getitem__, default=None)

    def eval_losses(self) -> dict[int, float]:
        """Step to the loss on the held out samples."""
        return self._measured("eval_loss")

    def scores(self) -> dict[int, float]:
        """Step to the picture–text score of its sample pictures."""
        return self._measured("score")

    def _measured(self, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in self.metrics() if name in line}

    def losses(self, step: int) -> list[float]:
        """The training loss of every step up to `step`."""
        lines = self.metrics()
        return [float(line["loss"]) for line in lines if "loss" in line and line["step"] <= step]

    def write_status(self, status: Status) -> None:
        """Raises ValueError if the disk is full or refuses."""
        write_status(self.folder, status)

    def lora_name(self) -> str | None:
        """The name of the run's LoRA file that was noted last."""
        status = read_status(self.folder)
        return None if status is None else status.lora

    def note_lora(self, name: str, step: int) -> None:
        """Write down the name of the run's LoRA file, but not of a shorter answer.

        Raises:
            ValueError: if the disk is full or refuses.
        """
        status = read_status(self.folder)
        if status is not None and step >= status.step and status.lora != name:
            write_status(self.folder, status.changed(lora=name))

    def log(self, metrics: Mapping[str, float | int | str | None]) -> None:
        """Append one line to the metrics.

        Raises:
            ValueError: if the disk is full.
        """
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dict(metrics)) + "\n")
        except OSError as error:
            raise not_written(self._metrics, error) from error

    def log_score(self, step: int, score: float, of: str) -> None:
        """Write down the score of a step, which may be long past, in the place of an earlier one.

        Args:
            of: what was scored and by which model, as in `forget_measures`.

        Raises:
            ValueError: if the disk is full.
        """
        lines = [line for line in self.metrics() if line["step"] != step or "score" not in line]
        lines.append({"step": step, "score": score, "of": of})
        self._write_metrics(sorted(lines, key=lambda line: line["step"]))

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of the metrics; what a crash cut short or spoilt is left out."""
        if not self._metrics.exists():
            return []
        whole = []
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(json.JSONDecodeError):
                whole.append(json.loads(line))
        return whole

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that will be repeated."""
        self._write_metrics([line for line in self.metrics() if line["step"] <= step])

    def forget_measures(self, name: str, *, keep: str) -> None:
        """Drop the values called `name` whose lines have another `of` than `keep`: measured on
        other pictures, or by another model, they make no curve with new ones."""
        lines = self.metrics()
        kept = [line for line in lines if name not in line or line.get("of") == keep]
        if len(kept) < len(lines):
            self._write_metrics(kept)

    def _write_metrics(self, lines: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)

        def write(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        write_atomically(self._metrics, write)
