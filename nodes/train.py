"""The training node: ComfyUI's side of `trainers.loop`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..trainers import loop
from ..trainers.adapters import file_tensors, lora_metadata, save_lora
from ..trainers.config import (
    COMPUTE_DTYPES,
    LORA_TARGETS,
    JobSettings,
    Length,
    LoraSettings,
    TrainSettings,
)
from ..trainers.files import write_atomically
from ..trainers.job import write_job
from ..trainers.memory import activation_bytes
from ..trainers.run import Run
from . import host
from .native import SampleSettings, add_lora, draw_latents, loaded_flux, to_training_device
from .wires import AtelierLatentCache, AtelierPromptCache

_NO_SAMPLES = (
    "Train LoRA drew no sample pictures: connect its vae and positive inputs, or disconnect its "
    "samples output."
)


class TrainLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierTrainLoRA",
            display_name="Train LoRA",
            category="Atelier/training",
            description="Trains a LoRA on the MODEL it is given, without a second copy. The "
            "defaults are the Hugging Face QLoRA recipe. Cancel keeps what is done; the same "
            "graph queued again goes on from there.",
            search_aliases=["qlora", "fine-tune", "finetune", "dreambooth"],
            inputs=_inputs(),
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="The trained LoRA."),
                io.Model.Output(display_name="model", tooltip="The MODEL with the LoRA on it."),
                io.String.Output(
                    display_name="lora_name",
                    tooltip="Name of the LoRA file in output/loras, as LoRA loaders list it.",
                ),
                io.LossMap.Output(
                    display_name="loss", tooltip="The loss of every step, for Plot Loss Graph."
                ),
                io.Image.Output(
                    display_name="samples",
                    tooltip="The sample pictures in order of their steps, the first from before "
                    "training.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, latents: Any, prompts: Any, **settings: Any) -> io.NodeOutput:
        data = loop.TrainingData(latents=latents, prompts=prompts)
        session = Session(model, data, _job(settings), cls.hidden.unique_id, _sampling(settings))
        trained = session.train()
        tensors = session.save(trained)
        samples = session.samples()
        return io.NodeOutput(
            tensors,
            add_lora(model, tensors, 1.0),
            session.lora_path.name,
            {"loss": trained.losses},
            samples if samples is not None else host.blocked_output(_NO_SAMPLES),
        )


def _inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="The base model, from Load Quantized FLUX."),
        AtelierLatentCache.Input("latents", tooltip="The encoded pictures, from Cache Latents."),
        AtelierPromptCache.Input("prompts", tooltip="The encoded captions, from Encode Prompts."),
        io.String.Input(
            "name",
            default="my_lora",
            tooltip="Name of the LoRA file and of the run's folder in output/atelier. A short code "
            "of the settings is added, so that nothing is ever overwritten.",
        ),
        io.Int.Input(
            "length",
            default=700,
            min=1,
            max=1_000_000,
            tooltip="How long to train, in the unit below. A finished run goes on when this grows.",
        ),
        io.Combo.Input(
            "unit",
            options=["steps", "epochs"],
            default="steps",
            tooltip="steps: updates of the LoRA. epochs: passes over all pictures. The node shows "
            "the other one while it trains.",
        ),
        io.Int.Input(
            "rank",
            default=4,
            min=1,
            max=1024,
            tooltip="Size of the LoRA; its alpha is the same, so the scale is 1. 4 to 16 is usual "
            "for a style or a subject. More learns more detail and makes a larger file.",
        ),
        io.Combo.Input(
            "targets",
            options=list(LORA_TARGETS),
            default="qlora",
            tooltip="Which layers learn. qlora: the image's attention, as the recipe does. all: "
            "the text's attention too. all+ffs: every layer of the blocks but the modulation.",
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-7,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="Size of a step of AdamW8bit. 1e-4 is the recipe's; 1e-3 is fast and rough.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=256,
            tooltip="Pictures computed at once, all of one size. Costs memory in proportion.",
        ),
        io.Int.Input(
            "gradient_accumulation",
            default=4,
            min=1,
            max=256,
            tooltip="Batches per step. Smooths the training like a larger batch, for time instead "
            "of memory.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53 - 1,
            control_after_generate=False,
            tooltip="Seed of the LoRA's start, the order of the pictures and the noise. Another "
            "seed is another run.",
        ),
        *_advanced_inputs(),
        io.Vae.Input("vae", optional=True, tooltip="The autoencoder, to draw sample pictures."),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip="The prompt of the sample pictures, from CLIP Text Encode and FluxGuidance.",
        ),
    ]


def _advanced_inputs() -> list[Any]:
    return [
        host.make_input(
            io.Float,
            "guidance",
            default=1.0,
            min=0.0,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Guidance given to the model while training. 1 keeps its distillation intact.",
        ),
        host.make_input(
            io.Combo,
            "compute_dtype",
            options=list(COMPUTE_DTYPES),
            default="auto",
            advanced=True,
            tooltip="Type of the arithmetic. auto: bf16 where the device is fast in it, fp16 with "
            "scaled gradients on older cards, fp32 on old CPUs. The LoRA itself is always fp32.",
        ),
        host.make_input(
            io.Boolean,
            "gradient_checkpointing",
            default=True,
            advanced=True,
            tooltip="Compute each block a second time in the backward pass: far less memory, about "
            "a third more time.",
        ),
        host.make_input(
            io.Int,
            "checkpoint_every",
            default=250,
            min=1,
            max=1_000_000,
            advanced=True,
            tooltip="Steps between saved states. One is also saved on Cancel. Does not change the "
            "result.",
        ),
        host.make_input(
            io.Int,
            "sample_every",
            default=250,
            min=0,
            max=1_000_000,
            advanced=True,
            tooltip="Steps between sample pictures, the first before training; 0 draws one at the "
            "end. Does not change the result.",
        ),
        host.make_input(
            io.Int,
            "sample_steps",
            default=20,
            min=1,
            max=1000,
            advanced=True,
            tooltip="Sampling steps of each sample picture.",
        ),
        host.make_input(
            io.Int,
            "sample_seed",
            default=0,
            min=0,
            max=2**53 - 1,
            control_after_generate=False,
            advanced=True,
            tooltip="Seed of the sample pictures: a KSampler with it gives the same picture.",
        ),
    ]


def _job(settings: dict[str, Any]) -> JobSettings:
    return JobSettings(
        name=settings["name"],
        length=Length(amount=settings["length"], unit=settings["unit"]),
        lora=LoraSettings(rank=settings["rank"], targets=settings["targets"]),
        train=TrainSettings(
            learning_rate=settings["learning_rate"],
            batch_size=settings["batch_size"],
            gradient_accumulation=settings["gradient_accumulation"],
            guidance=settings["guidance"],
            gradient_checkpointing=settings["gradient_checkpointing"],
            compute_dtype=settings["compute_dtype"],
            seed=settings["seed"],
        ),
        checkpoint_every=settings["checkpoint_every"],
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What sample pictures are drawn with; None in `vae` or `positive` draws none."""

    vae: Any
    positive: Any
    every: int
    steps: int
    seed: int

    def key(self) -> str:
        """Hash of all that determines a picture, the weights aside."""
        digest = hashlib.sha256(f"{self.steps} {self.seed}".encode())
        for embeds, options in self.positive:
            digest.update(embeds.float().cpu().numpy().tobytes())
            pooled, guidance = options.get("pooled_output"), options.get("guidance")
            digest.update(b"" if pooled is None else pooled.float().cpu().numpy().tobytes())
            digest.update(repr(guidance).encode())
        return digest.hexdigest()[:8]


def _sampling(settings: dict[str, Any]) -> Sampling:
    return Sampling(
        vae=settings.get("vae"),
        positive=settings.get("positive"),
        every=settings["sample_every"],
        steps=settings["sample_steps"],
        seed=settings["sample_seed"],
    )


class Session:
    """One training inside ComfyUI: the loop between the host's memory, progress and sampling."""

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
        draws = self._sampling.vae is not None and self._sampling.positive is not None
        hooks = loop.Hooks(
            check_stop=host.check_interrupted,
            on_start=self._on_start,
            on_step=self._on_step,
            sample=self._sample if draws else None,
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
        if self._sampling.vae is None or self._sampling.positive is None:
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
