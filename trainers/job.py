"""A training without ComfyUI, from the job file that every run leaves in its folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .caches import LatentCache, PromptCache
from .config import JobSettings, job_from_json
from .data import TrainingData
from .devices import default_device, free_bytes, system_memory
from .frozen import FrozenLora, load_frozen
from .hooks import Hooks
from .load import load_flux
from .loop import open_run, save_trained, train, workload
from .packed_copy import PackedCopies
from .plan import Plan
from .preflight import require_fits


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job file, read."""

    model: str
    format: str
    block_streaming: str
    data: TrainingData
    settings: JobSettings
    frozen: tuple[FrozenLora, ...] = ()
    """The LoRAs that the base model had, from the file beside the job file."""
    assistant: tuple[FrozenLora, ...] = ()
    """Those that only help to train, in the same way."""


def read_job(path: Path) -> Job:
    """Read a job file.

    Raises:
        ValueError: if it is no job file, or a setting in it is wrong.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        job = Job(
            model=values["model"],
            format=values["format"],
            block_streaming=values.get("block_streaming", "auto"),
            data=TrainingData(
                latents=LatentCache.from_json(values["latents"]),
                prompts=PromptCache.from_json(values["prompts"]),
            ),
            settings=job_from_json(values["settings"]),
            frozen=_loras(path, values, "frozen_loras"),
            assistant=_loras(path, values, "assistant_loras"),
        )
    except FileNotFoundError:
        raise ValueError(
            f"The job file '{path}' does not exist. Every run of Train LoRA has one: "
            "output/atelier/<run>/job.json."
        ) from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{path.name}' is not a job file: {error!r}. Take the job.json of a run, or correct "
            "what you changed in it."
        ) from None
    if not job.model:
        raise ValueError(
            f"The run of '{path}' was trained on a MODEL of ComfyUI's own loader or of Fuse LoRA, "
            'whose file is not known here. Write the path of a file of that model behind "model" '
            "in the job file."
        )
    return job


def _loras(path: Path, values: dict[str, Any], name: str) -> tuple[FrozenLora, ...]:
    return load_frozen(path.parent / values[name]) if name in values else ()


def run_job(job: Job, output: Path, hooks: Hooks) -> Path:
    """Train the job on the accelerator, or the CPU; returns the LoRA file in `output`.

    Blocks are streamed from disk out of a quantized copy in `output`/packed, which is made there.

    Raises:
        ValueError: if the device has not enough memory, before anything of the run is written, and
            all that `train` raises.
    """
    device, streaming = default_device(), job.block_streaming
    free = free_bytes(device)
    with torch.no_grad():
        base = load_flux(
            job.model,
            format=job.format,
            quantize_on=device,  # and into RAM: nothing stays there before it is known to fit
            copies=PackedCopies(output / "packed") if streaming == "disk" else None,
            streaming=streaming,
        )
    base = dataclasses.replace(base, frozen=job.frozen, assistant=job.assistant)
    if device.type == "cpu":
        free = free_bytes(device)  # beside the weights, see `require_fits`
    plan = Plan.of(base, workload(job.settings, base, job.data, device), device)

    def check_memory() -> None:
        hooks.before_start()
        if free is not None:
            require_fits(plan, free, system_memory())

    def take_device() -> None:
        hooks.take_device()
        base.store.prepare(device, _room(plan, free))

    own = dataclasses.replace(hooks, before_start=check_memory, take_device=take_device)
    run = open_run(output, job.settings, base, job.data)
    trained = train(run, base, job.data, job.settings, own)
    return save_trained(output, trained, run, base)


def _room(plan: Plan, free: int | None) -> int | None:
    """Of the free bytes those that the training leaves for the weights; None for all that they
    want, as on a CPU, where they are already."""
    if free is None or plan.device.type == "cpu":
        return None
    return free - plan.needed.beside_weights
