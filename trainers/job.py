"""A training without ComfyUI, from the job file that every run leaves in its folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from .caches import LatentCache, PromptCache
from .config import JobSettings, job_from_json
from .devices import default_device, free_bytes
from .frozen import FrozenLora, load_frozen
from .load import BaseFlux, load_flux
from .loop import Hooks, TrainingData, open_run, save_trained, train, workload
from .memory import estimate_training
from .packed_copy import PackedCopies


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
            frozen=load_frozen(path.parent / values["frozen_loras"])
            if "frozen_loras" in values
            else (),
        )
    except FileNotFoundError:
        raise ValueError(f"The job file '{path}' does not exist.") from None
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"'{path.name}' is not a job file: {error!r}.") from None
    if not job.model:
        raise ValueError(
            f"The run of '{path}' was trained on a MODEL of ComfyUI's own loader, whose file is "
            'not known here. Write the path of that file behind "model" in the job file.'
        )
    return job


def run_job(job: Job, output: Path, hooks: Hooks) -> Path:
    """Train the job on the accelerator, or the CPU; returns the LoRA file in `output`.

    Blocks are streamed from disk out of a quantized copy in `output`/packed, which is made there.
    """
    device, streaming = default_device(), job.block_streaming
    with torch.no_grad():
        base = load_flux(
            job.model,
            format=job.format,
            device=device if streaming == "off" else "cpu",
            quantize_on=device,
            copies=PackedCopies(output / "packed") if streaming == "disk" else None,
            streaming=streaming,
        )
        base = dataclasses.replace(base, frozen=job.frozen)
        base.store.prepare(device, _room(job, base, device))
    run = open_run(output, job.settings, base, job.data)
    trained = train(run, base, job.data, job.settings, hooks)
    return save_trained(output, trained, run, base)


def _room(job: Job, base: BaseFlux, device: torch.device) -> int | None:
    """Bytes of the device that training leaves for the weights, where they are known."""
    free = free_bytes(device)
    if free is None:
        return None
    work = workload(job.settings, base, job.data, device)
    return free - estimate_training(base.config, base.format, work).beside_weights
