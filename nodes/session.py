"""One training inside ComfyUI: the loop between the host's memory, progress and sampling."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..trainers import loop
from ..trainers.adapters import file_tensors
from ..trainers.config import JobSettings, TrainSettings
from ..trainers.data import TrainingData
from ..trainers.devices import describe_device, system_memory
from ..trainers.files import write_atomically
from ..trainers.load import BaseFlux, LoadedFlux
from ..trainers.plan import Plan
from ..trainers.preflight import require_fits
from ..trainers.run import Run
from . import host
from .encoders import require_flux_vae, vae_identity
from .native import add_lora, draw_latents, to_training_device
from .trainable import model_to_train

_OUT_OF_MEMORY = (
    "The GPU's memory is not enough for this training; what was done is saved. Turn "
    "gradient_checkpointing and activations_in_ram on, or set block_streaming of Load Quantized "
    "FLUX to ram: this run then goes on. Smaller pictures, a batch size of 1, fewer targets or a "
    "lower rank need less too, as a new run."
)
_OUT_OF_MEMORY_FROM_CORE = (
    "The GPU's memory is not enough for this training; what was done is saved. Turn "
    "gradient_checkpointing and activations_in_ram on: this run then goes on. Or start a new run: "
    "the model loaded by Load Quantized FLUX in fewer bits, with its block_streaming on ram; "
    "smaller pictures, a batch size of 1, fewer targets or a lower rank."
)


@dataclass(frozen=True)
class Result:
    """What the node gives: tensors and name of the LoRA file, losses, pictures [N, H, W, 3]."""

    tensors: dict[str, Tensor]
    lora_name: str
    losses: list[float]
    samples: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What sample pictures are drawn with; `vae` and `positive` are both None to draw none."""

    vae: Any = None
    positive: Any = None
    every: int = 250
    steps: int = 20
    seed: int = 0

    @property
    def is_on(self) -> bool:
        return self.vae is not None

    def check_fits(self, base: BaseFlux) -> None:
        """Raises ValueError if one of the two inputs is missing or belongs to another model."""
        if (self.vae is None) != (self.positive is None):
            raise ValueError(
                "Sample pictures need both the vae and the positive input of Train LoRA: connect "
                "the other one too, or neither."
            )
        if not self.is_on:
            return
        require_flux_vae(self.vae)
        width, needed = self.positive[0][0].shape[-1], base.config.context_dim
        if width != needed:
            raise ValueError(
                f"The prompt on Train LoRA's positive input has a width of {width}, and this model "
                f"needs {needed}. Encode it with the CLIP that belongs to the model."
            )

    def key(self, width: int, height: int) -> str:
        """Hash of what determines a picture, the weights of the LoRA aside."""
        digest = hashlib.sha256(f"{width} {height} {self.steps} {self.seed}".encode())
        digest.update(vae_identity(self.vae).encode())
        for embeds, options in self.positive:
            tensors = [embeds, options.get("pooled_output"), *options.get("reference_latents", [])]
            for tensor in tensors:
                digest.update(b"" if tensor is None else tensor.float().cpu().numpy().tobytes())
            digest.update(repr(options.get("guidance")).encode())
        return digest.hexdigest()[:8]


class Session:
    """The training that one execution of the Train LoRA node asks for."""

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        job: JobSettings,
        node_id: str,
        sampling: Sampling,
    ) -> None:
        self._model, self._data, self._job, self._sampling = model, data, job, sampling
        self._node_id = node_id
        self._trained_on = model_to_train(model)
        self._base = self._trained_on.base
        self._forecast: list[str] = []
        sampling.check_fits(self._base)
        self._progress = host.Progress()
        self._run: Run = loop.open_run(host.atelier_output(), job, self._base, data)
        self._steps_per_epoch = loop.steps_per_epoch(job, data)
        # The entry with the smallest key: the order of the files must not change the pictures.
        self._sampled = min(data.latents.entries, key=lambda entry: entry.name)

    def train(self) -> Result:
        """Train, or take the finished run from disk; write the LoRA file; draw the last picture."""
        hooks = loop.Hooks(
            check_stop=host.check_interrupted,
            before_start=self._check_memory,
            on_start=self._on_start,
            on_step=self._on_step,
            sample=self._sample_and_go_on if self._sampling.is_on else None,
            sample_every=self._sampling.every,
        )
        try:
            with host.ended_before_exit(), host.training_mode():
                trained = loop.train(self._run, self._base, self._data, self._job, hooks)
            path = loop.save_trained(host.lora_folder(), trained, self._run, self._base)
            if self._sampling.is_on:
                self._sample(trained.step, trained.lora)
        except Exception as error:
            if not host.is_out_of_memory(error):
                raise
            host.free_device_memory()
            is_ours = isinstance(self._base, LoadedFlux)
            raise ValueError(_OUT_OF_MEMORY if is_ours else _OUT_OF_MEMORY_FROM_CORE) from error
        tensors = file_tensors(trained.lora, self._job.lora)
        return Result(tensors, path.name, trained.losses, self._samples(trained.step))

    def _samples(self, last_step: int) -> Tensor | None:
        """The sample pictures [N, H, W, 3] in 0..1 up to a step, or None if none were asked for."""
        if not self._sampling.is_on:
            return None
        wanted = self._sample_path(last_step)
        ending = wanted.name.removeprefix(f"step-{last_step:06d}")
        files = sorted(wanted.parent.glob(f"step-*{ending}"))
        until = [file for file in files if file.name <= wanted.name]
        pictures = [np.asarray(Image.open(file).convert("RGB")) for file in until]
        return torch.from_numpy(np.stack(pictures)).float() / 255

    def _take_device(self) -> None:
        """Ask the host to have the base model on the device, and room for the training."""
        to_training_device(self._trained_on.load(), self._plan().needed.beside_weights)

    def _plan(self) -> Plan:
        device = host.compute_device()
        workload = loop.workload(self._job, self._base, self._data, device)
        plan = Plan.of(self._base, workload, device)
        return replace(plan, other_copy=self._trained_on.other_copy)

    def _check_memory(self) -> None:
        self._trained_on.require_memory()
        plan = self._plan()
        lines = require_fits(plan, host.free_memory(), system_memory())
        self._forecast = [*lines, describe_device(plan.device)]

    def _on_start(self, step: int, num_steps: int) -> None:
        lines = [f"{num_steps} steps = {num_steps / self._steps_per_epoch:.1f} epochs."]
        if 0 < step < num_steps:
            lines.append(f"The run goes on from step {step}.")
        if self._base.frozen:
            lines.append("The LoRAs on this MODEL stay as they are: the new one learns on top.")
        if not host.is_deterministic():
            lines.append("A resumed run is close to an unbroken one, not equal bit for bit.")
        lines += self._without_effect()
        if step < num_steps:
            lines += [*self._trained_on.sentences, *self._forecast]
        host.show_text("\n".join(lines), self._node_id)
        if step < num_steps:
            self._take_device()

    def _without_effect(self) -> list[str]:
        """A sentence for every setting that was changed and does nothing here."""
        lines, sampling = [], self._sampling
        if self._job.train.guidance != TrainSettings.guidance and not self._base.config.guidance:
            lines.append("The setting guidance has no effect: this model takes no guidance.")
        if self._job.activations_in_ram and host.compute_device().type == "cpu":
            lines.append("The setting activations_in_ram has no effect: a CPU computes in RAM.")
        if not sampling.is_on and sampling != Sampling():
            lines.append(
                "The settings of the sample pictures have no effect: connect vae and positive to "
                "get pictures."
            )
        return lines

    def _on_step(self, step: loop.Step) -> None:
        minutes, seconds = divmod(round(step.seconds_left), 60)
        host.show_text(
            f"step {step.step}/{step.num_steps} (epoch {step.step / self._steps_per_epoch:.1f})  "
            f"loss {step.loss:.4f}  {step.seconds_per_step:.2f} s/step  "
            f"{minutes}:{seconds:02d} left",
            self._node_id,
        )
        self._progress.show(step.step, step.num_steps)

    def _sample_path(self, step: int) -> Path:
        key = self._sampling.key(self._sampled.width, self._sampled.height)
        return self._run.folder / "samples" / f"step-{step:06d}-{key}.png"

    def _sample_and_go_on(self, step: int, lora: dict[str, Tensor]) -> None:
        self._sample(step, lora)
        self._take_device()

    def _sample(self, step: int, lora: dict[str, Tensor]) -> None:
        path = self._sample_path(step)
        if path.exists():
            return
        with torch.inference_mode():
            model = add_lora(self._model, file_tensors(lora, self._job.lora), 1.0)
            latents = draw_latents(
                model,
                self._sampling.positive,
                width=self._sampled.width,
                height=self._sampled.height,
                steps=self._sampling.steps,
                seed=self._sampling.seed,
            )
            picture = self._sampling.vae.decode(latents)[0]
        # Cut to 8 bits as Save Image does, so that a KSampler's picture is the same to the bit.
        pixels = (picture * 255).clamp(0, 255).byte().cpu().numpy()
        write_atomically(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))
