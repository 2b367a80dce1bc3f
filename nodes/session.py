"""One training inside ComfyUI: the loop between the host's memory, progress and sampling."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..trainers import loop
from ..trainers.adapters import file_tensors, lora_metadata, save_lora
from ..trainers.config import JobSettings
from ..trainers.files import write_atomically
from ..trainers.job import write_job
from ..trainers.memory import activation_bytes
from ..trainers.run import Run
from . import host
from .native import SampleSettings, add_lora, draw_latents, loaded_flux, to_training_device


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What sample pictures are drawn with; None in `vae` or `positive` draws none."""

    vae: Any
    positive: Any
    every: int
    steps: int
    seed: int

    @property
    def is_on(self) -> bool:
        return self.vae is not None and self.positive is not None

    def key(self) -> str:
        """Hash of all that determines a picture, the weights aside."""
        digest = hashlib.sha256(f"{self.steps} {self.seed}".encode())
        for embeds, options in self.positive:
            digest.update(embeds.float().cpu().numpy().tobytes())
            pooled, guidance = options.get("pooled_output"), options.get("guidance")
            digest.update(b"" if pooled is None else pooled.float().cpu().numpy().tobytes())
            digest.update(repr(guidance).encode())
        return digest.hexdigest()[:8]


class Session:
    """The training that one execution of the Train LoRA node asks for."""

    def __init__(
        self,
        model: Any,
        data: loop.TrainingData,
        job: JobSettings,
        node_id: str,
        sampling: Sampling,
    ) -> None:
        self._model, self._data, self._job, self._sampling = model, data, job, sampling
        self._node_id = node_id
        self._base = loaded_flux(model)
        self._progress = host.Progress()
        self._run: Run = loop.open_run(host.atelier_output(), job, self._base, data)
        self._steps_per_epoch = loop.steps_per_epoch(job, data)

    @property
    def lora_path(self) -> Path:
        return host.lora_file(self._run.name)

    def train(self) -> loop.Trained:
        """Train, or take the finished run from disk."""
        write_job(self._run.folder, self._base, self._data, self._job)
        hooks = loop.Hooks(
            check_stop=host.check_interrupted,
            on_start=self._on_start,
            on_step=self._on_step,
            sample=self._sample if self._sampling.is_on else None,
            sample_every=self._sampling.every,
        )
        try:
            with host.ended_before_exit(), host.training_mode():
                self._take_device()
                return loop.train(self._run, self._base, self._data, self._job, hooks)
        except torch.OutOfMemoryError as error:
            host.free_device_memory()
            raise ValueError(
                "The GPU's memory is not enough for this training; the state so far is saved. "
                "Turn gradient_checkpointing on, or use smaller pictures, a batch size of 1, fewer "
                "targets or a lower rank."
            ) from error

    def save(self, trained: loop.Trained) -> dict[str, Tensor]:
        """Write the LoRA file; returns its tensors."""
        tensors = file_tensors(trained.lora, self._job.lora)
        metadata = lora_metadata(
            name=self._job.name,
            settings=self._job.lora,
            base_format=self._base.format,
            steps=trained.step,
            run=self._run.identity.to_json(),
        )
        save_lora(self.lora_path, tensors, metadata)
        return tensors

    def samples(self) -> Tensor | None:
        """The sample pictures [N, H, W, 3] in 0..1 by step, or None."""
        if not self._sampling.is_on:
            return None
        files = sorted((self._run.folder / "samples").glob(f"step-*-{self._sampling.key()}.png"))
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        return torch.from_numpy(np.stack(pictures)).float() / 255

    def _take_device(self) -> None:
        """Ask the host to have the base model on the device, and room for the training."""
        entry = max(self._data.latents.entries, key=lambda entry: entry.width * entry.height)
        num_tokens = entry.width * entry.height // 256 + self._data.prompts.length
        to_training_device(
            self._model,
            activation_bytes(
                self._base.config,
                num_tokens=num_tokens,
                batch_size=self._job.train.batch_size,
                checkpointing=self._job.train.gradient_checkpointing,
            ),
        )

    def _on_start(self, step: int, num_steps: int) -> None:
        epochs = num_steps / self._steps_per_epoch
        resumed = f", going on from step {step}" if 0 < step < num_steps else ""
        host.show_text(f"{num_steps} steps = {epochs:.1f} epochs{resumed}", self._node_id)

    def _on_step(self, step: loop.Step) -> None:
        minutes, seconds = divmod(round(step.seconds_left), 60)
        host.show_text(
            f"step {step.step}/{step.num_steps} (epoch {step.step / self._steps_per_epoch:.1f})  "
            f"loss {step.loss:.4f}  {step.seconds_per_step:.2f} s/step  "
            f"{minutes}:{seconds:02d} left",
            self._node_id,
        )
        self._progress.show(step.step, step.num_steps)

    def _sample(self, step: int, lora: dict[str, Tensor]) -> None:
        path = self._run.folder / "samples" / f"step-{step:06d}-{self._sampling.key()}.png"
        if path.exists():
            return
        entry = self._data.latents.entries[0]
        settings = SampleSettings(
            width=entry.width,
            height=entry.height,
            steps=self._sampling.steps,
            seed=self._sampling.seed,
        )
        with torch.inference_mode():
            model = add_lora(self._model, file_tensors(lora, self._job.lora), 1.0)
            latents = draw_latents(model, self._sampling.positive, settings)
            picture = self._sampling.vae.decode(latents)[0]
        # Cut to 8 bits as Save Image does, so that a KSampler's picture is the same to the bit.
        pixels = (picture * 255).clamp(0, 255).byte().cpu().numpy()
        write_atomically(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))
        self._take_device()
