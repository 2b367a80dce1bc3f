"""The training loop. Read `train` from top to bottom; everything it calls is a page of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from .adapters import Lora, attach_lora, file_tensors, lora_metadata, save_lora
from .batches import BatchOrder
from .caches import LatentEntry
from .config import JobSettings, TrainSettings, to_json
from .data import TrainingBatch, TrainingData
from .devices import compute_dtype, dtype_name, give_back_memory, require_trainable_on
from .flow import add_noise, flow_target, sample_sigmas, seeded, squared_error
from .flux import (
    build_transformer,
    recompute_blocks,
    velocity,
)
from .frozen import fingerprint, frozen_bytes
from .load import BaseFlux
from .memory import Workload
from .optimizers import load_optimizer_tensors, make_adamw8bit, optimizer_tensors
from .run import FROZEN_FILE, Checkpoint, Run, RunIdentity

_LARGE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known after an optimizer step."""

    step: int
    num_steps: int
    loss: float
    seconds_per_step: float

    @property
    def seconds_left(self) -> float:
        return (self.num_steps - self.step) * self.seconds_per_step


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the surroundings want to hear of a run, and how they stop it."""

    check_stop: Callable[[], None] = lambda: None
    """Called before every micro-step; it raises to stop. The run is saved and the error goes on."""
    before_start: Callable[[], None] = lambda: None
    """Called once if there are steps to train, before anything is written; it raises to refuse."""
    on_start: Callable[[int, int], None] = lambda step, num_steps: None
    """Called once with the step the run starts from and its length; no other process trains it."""
    on_step: Callable[[Step], None] = lambda step: None
    sample: Callable[[int, dict[str, Tensor]], None] | None = None
    """Called with the step and the LoRA's tensors, to draw pictures with them before that step."""
    sample_every: int = 0
    """Optimizer steps between samples, the first at step 0; 0 draws none."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The outcome of a run."""

    lora: dict[str, Tensor]
    """Trained tensors by diffusers name, float32 on the CPU."""
    losses: list[float]
    """Training loss of every optimizer step."""
    step: int


def open_run(root: Path, job: JobSettings, base: BaseFlux, data: TrainingData) -> Run:
    """The run folder that this job, model and data belong to."""
    identity = RunIdentity(
        base=base.identity,
        base_format=base.format,
        latents=data.latents.fingerprint(),
        prompts=data.prompts.fingerprint(),
        job=job,
        frozen=fingerprint(base.frozen),
    )
    manifest = {
        "model": base.path,
        "format": base.format,
        "block_streaming": base.store.streaming,
        "latents": data.latents.to_json(),
        "prompts": data.prompts.to_json(),
        "settings": to_json(job),
    }
    if base.frozen:
        manifest["frozen_loras"] = FROZEN_FILE
    return Run(root, identity, manifest, base.frozen)


def steps_per_epoch(job: JobSettings, data: TrainingData) -> float:
    """Optimizer steps of one pass over the data; a step may reach over the end of an epoch."""
    return _order(job, data).batches_per_epoch / job.train.gradient_accumulation


def workload(
    job: JobSettings, base: BaseFlux, data: TrainingData, device: torch.device
) -> Workload:
    """What the largest micro-step of a job computes, to estimate its memory."""
    width, height, count = _order(job, data).largest_batch(data.prompts.length)
    dtype = compute_dtype(job.train.compute_dtype, device)
    return Workload(
        width=width,
        height=height,
        prompt_length=data.prompts.length,
        batch_size=count,
        lora=job.lora,
        dtype=dtype,
        gradient_checkpointing=job.train.gradient_checkpointing,
        accumulates=job.train.gradient_accumulation > 1,
        activations_in_ram=job.activations_in_ram,
        frozen_bytes=frozen_bytes(base.frozen, dtype),
    )


def _order(job: JobSettings, data: TrainingData) -> BatchOrder:
    settings = job.train
    return BatchOrder(
        data.latents.subsets,
        batch_size=settings.batch_size,
        seed=settings.seed,
        gradient_accumulation=settings.gradient_accumulation,
    )


def train(
    run: Run, base: BaseFlux, data: TrainingData, job: JobSettings, hooks: Hooks = Hooks()
) -> Trained:
    """Train a LoRA on the store's device until the job's length, from where the run stands.

    A run that already has that length is answered from disk. Whatever stops the loop, the state
    after the last whole optimizer step is saved first.

    Raises:
        ValueError: for settings that do not fit the model or the data, a loss that diverged, or a
            run that another process trains.
    """
    length = job.length.num_steps(steps_per_epoch(job, data))
    if run.start_step(length) == length:
        return _from_disk(run, length, hooks)

    data.check_fits(base.config)
    hooks.before_start()
    with run.locked():
        start = run.start_step(length)  # again: another process may have trained until now
        if start == length:
            return _from_disk(run, length, hooks)
        hooks.on_start(start, length)
        run.create()
        run.forget_metrics_after(start)
        state = TrainState(base, job, run.load(start) if start else None)
        order = _order(job, data)
        step = start
        try:
            while step < length:
                if hooks.sample and hooks.sample_every and step % hooks.sample_every == 0:
                    hooks.sample(step, state.lora.state())
                began = time.perf_counter()
                loss, grad_norm = optimizer_step(state, step, order, data, hooks)
                step += 1
                seconds = time.perf_counter() - began
                run.log({"step": step, "loss": loss, "grad_norm": grad_norm, "seconds": seconds})
                hooks.on_step(
                    Step(step=step, num_steps=length, loss=loss, seconds_per_step=seconds)
                )
                if step % job.checkpoint_every == 0:
                    _save(run, state, step)
        finally:
            # Cancel and errors come here too. Gradients of an unfinished step are dropped: every
            # random number is keyed by its micro-step, so resuming computes them again.
            lora = state.lora.state()
            try:
                if step > start:
                    _save(run, state, step)
            finally:
                state.close()
    return _trained(run, length, lora)


def _save(run: Run, state: TrainState, step: int) -> None:
    """Save the state, unless it is spoilt: resuming from that would never recover."""
    if state.lora.is_finite():
        run.save(state.checkpoint(step))


def _from_disk(run: Run, length: int, hooks: Hooks) -> Trained:
    hooks.on_start(length, length)
    return _trained(run, length, run.load(length).adapter)


def _trained(run: Run, step: int, lora: dict[str, Tensor]) -> Trained:
    losses = [float(line["loss"]) for line in run.metrics() if line["step"] <= step]
    return Trained(lora=lora, losses=losses, step=step)


def save_trained(folder: Path, trained: Trained, run: Run, base: BaseFlux) -> Path:
    """Write the LoRA file of a run, named after the run and its steps; returns its path.

    Raises:
        ValueError: if a weight is not finite, or the disk is full.
    """
    job = run.identity.job
    path = folder / f"{run.name}-{trained.step}.safetensors"
    metadata = lora_metadata(
        name=job.name,
        settings=job.lora,
        base=base,
        steps=trained.step,
        run=run.identity.to_json(),
    )
    save_lora(path, file_tensors(trained.lora, job.lora), metadata)
    return path


class TrainState:
    """All that changes while training: the LoRA, the optimizer, the gradient scaler."""

    def __init__(self, base: BaseFlux, job: JobSettings, saved: Checkpoint | None = None) -> None:
        self.settings = job.train
        self.activations_in_ram = job.activations_in_ram
        self.device = base.store.device
        require_trainable_on(self.device)
        # Between forward and backward on a CPU, whose passes each leave holes in the heap: 1 GB for
        # FLUX.1-dev. Small networks leave little, and would pay 7 % of their step.
        self.gives_back_memory = self.device.type == "cpu" and base.store.num_bytes > _LARGE_BYTES
        # A run keeps the dtype it began with, wherever "auto" would lead now.
        name = saved.values["compute_dtype"] if saved else job.train.compute_dtype
        self.dtype = compute_dtype(name, self.device)
        self.transformer = build_transformer(base.store, base.config, self.dtype, base.frozen)
        self.lora: Lora = attach_lora(self.transformer, job.lora, seed=job.train.seed)
        self.transformer.train()
        if job.train.gradient_checkpointing:
            recompute_blocks(self.transformer)
        self.parameters = list(self.lora.parameters.values())
        self.optimizer = make_adamw8bit(self.parameters, job.train.learning_rate)
        # float16 gradients underflow without a scale; for other dtypes the scaler does nothing.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )
        if saved:
            self._restore(saved)

    def checkpoint(self, step: int) -> Checkpoint:
        tensors, values = optimizer_tensors(self.optimizer)
        all_values = {
            "compute_dtype": dtype_name(self.dtype),
            "optimizer": values,
            "scaler": self.scaler.state_dict(),
        }
        return Checkpoint(step, self.lora.state(), tensors, all_values)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.lora.load_state(checkpoint.adapter)
        values = checkpoint.values
        load_optimizer_tensors(self.optimizer, checkpoint.optimizer, values["optimizer"])
        self.scaler.load_state_dict(values["scaler"])

    def saving(self) -> AbstractContextManager:
        """Where autograd keeps what backward needs of the forward pass within it."""
        if not self.activations_in_ram:
            return nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def close(self) -> None:
        """Let go of the network and the optimizer's state, which may be large on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        del self.transformer, self.lora, self.optimizer, self.parameters


def optimizer_step(
    state: TrainState, step: int, order: BatchOrder, data: TrainingData, hooks: Hooks
) -> tuple[float, float | None]:
    """One optimizer step over all its micro-steps: the mean loss, and the gradient norm, which is
    None when float16 overflowed and the step is left out.

    Raises:
        ValueError: if the loss or a gradient is not a number; the weights are untouched.
    """
    accumulation = state.settings.gradient_accumulation
    losses = []
    for micro_step in range(step * accumulation, (step + 1) * accumulation):
        hooks.check_stop()
        loss = _forward_backward(state, micro_step, order.batch(micro_step), data)
        losses.append(loss)
    state.scaler.unscale_(state.optimizer)
    grad_norm = float(nn.utils.clip_grad_norm_(state.parameters, state.settings.max_grad_norm))
    is_finite = math.isfinite(grad_norm)
    if not is_finite and not state.scaler.is_enabled():
        raise ValueError(_diverged(step, state.settings))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return sum(losses) / accumulation, grad_norm if is_finite else None


def _forward_backward(
    state: TrainState, micro_step: int, entries: list[LatentEntry], data: TrainingData
) -> float:
    """Add the gradients of one batch; returns its loss."""
    settings = state.settings
    generator = seeded(settings.seed, "micro-step", micro_step)
    # Draws of their own: another caption or a flip trains with the same noise.
    samples = data.choose(entries, seeded(settings.seed, "choice", micro_step))
    batch = data.load(samples, state.device, generator)
    noise = torch.randn(batch.latents.shape, generator=generator).to(state.device)
    sigma = sample_sigmas(len(entries), generator).to(state.device)
    target = flow_target(batch.latents, noise)
    if entries[0].is_regularization:  # as are all of its subset: the model without the LoRA teaches
        with state.lora.disabled(), torch.no_grad():
            target = _predict(state, batch, noise, sigma)
    with state.saving():
        prediction = _predict(state, batch, noise, sigma)
        loss = squared_error(prediction, target, batch.weights).mean()
    if not torch.isfinite(loss):
        raise ValueError(_diverged(micro_step // settings.gradient_accumulation, settings))
    if state.gives_back_memory:
        give_back_memory()
    state.scaler.scale(loss / settings.gradient_accumulation).backward()
    return float(loss.detach())


def _predict(state: TrainState, batch: TrainingBatch, noise: Tensor, sigma: Tensor) -> Tensor:
    """The velocity [B, C, h, w] of the network on the latents mixed with `noise` at `sigma` [B]."""
    return velocity(
        state.transformer,
        add_noise(batch.latents, noise, sigma).to(state.dtype),
        sigma=sigma,
        prompt_embeds=batch.prompt_embeds,
        pooled=batch.pooled,
        guidance=state.settings.guidance,
    )


def _diverged(step: int, settings: TrainSettings) -> str:
    return (
        f"The loss is not a number after {step} steps: the training diverged. Lower the learning "
        f"rate ({settings.learning_rate}), or set the compute dtype to bf16 or fp32. "
        "Every step before it is kept."
    )
