"""The training loop. Read `train` from top to bottom; everything it calls is a page of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .adapters import Lora, attach_lora
from .batches import BatchOrder
from .caches import LatentCache, LatentEntry, PromptCache
from .config import JobSettings, TrainSettings
from .devices import compute_dtype
from .flow import add_noise, flow_loss, sample_sigmas, seeded
from .flux import build_transformer, velocity
from .load import LoadedFlux
from .optimizers import load_optimizer_tensors, make_adamw8bit, optimizer_tensors
from .run import Checkpoint, Run, RunIdentity


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known after an optimizer step."""

    step: int
    num_steps: int
    loss: float
    grad_norm: float
    seconds_per_step: float

    @property
    def seconds_left(self) -> float:
        return (self.num_steps - self.step) * self.seconds_per_step


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the surroundings want to hear of a run, and how they stop it."""

    check_stop: Callable[[], None] = lambda: None
    """Called before every micro-step; it raises to stop. The run is saved and the error goes on."""
    on_start: Callable[[int, int], None] = lambda step, num_steps: None
    """Called once with the step the run starts from and its length."""
    on_step: Callable[[Step], None] = lambda step: None
    sample: Callable[[int, dict[str, Tensor]], None] | None = None
    """Called with the step and the LoRA's tensors, to draw pictures with them. It is asked again
    for the last step of a run that is answered from disk."""
    sample_every: int = 0
    """Optimizer steps between samples, the first at step 0; 0 samples only at the end."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The outcome of a run."""

    lora: dict[str, Tensor]
    """Trained tensors by diffusers name, float32 on the CPU."""
    losses: list[float]
    """Training loss of every optimizer step."""
    step: int


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The two caches, paired by record, and how a batch of them becomes tensors."""

    latents: LatentCache
    prompts: PromptCache

    def load(self, entries: list[LatentEntry], device: torch.device, generator: torch.Generator):
        """Latents [B, C, H, W] drawn from their distributions, prompt embeddings, pooled ones."""
        pictures = [self.latents.load(entry) for entry in entries]
        texts = [self.prompts.load(entry.caption) for entry in entries]
        mean = torch.stack([picture.mean for picture in pictures])
        std = torch.stack([picture.std for picture in pictures])
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        prompt_embeds = torch.stack([text.prompt_embeds for text in texts])
        pooled = torch.stack([text.pooled for text in texts])
        return latents.to(device), prompt_embeds.to(device), pooled.to(device)


def open_run(root: Path, job: JobSettings, base: LoadedFlux, data: TrainingData) -> Run:
    """The run folder that this job, model and data belong to."""
    identity = RunIdentity(
        base=base.identity,
        base_format=base.format,
        latents=data.latents.fingerprint(),
        prompts=data.prompts.fingerprint(),
        job=job,
    )
    return Run(root, identity)


def steps_per_epoch(job: JobSettings, data: TrainingData) -> int:
    """Optimizer steps of one pass over the data; the last one of an epoch may be begun early."""
    order = _order(job, data)
    return max(1, math.ceil(order.batches_per_epoch / job.train.gradient_accumulation))


def _order(job: JobSettings, data: TrainingData) -> BatchOrder:
    settings = job.train
    return BatchOrder(data.latents.entries, batch_size=settings.batch_size, seed=settings.seed)


def train(
    run: Run, base: LoadedFlux, data: TrainingData, job: JobSettings, hooks: Hooks = Hooks()
) -> Trained:
    """Train a LoRA on the store's device until the job's length, from where the run stands.

    A run that already has that length is answered from disk. Whatever stops the loop, the state
    after the last whole optimizer step is saved first.

    Raises:
        ValueError: for settings that do not fit the model or the data, or a loss that diverged.
    """
    length = job.length.num_steps(steps_per_epoch(job, data))
    start = run.start_step(length)
    run.forget_metrics_after(start)
    hooks.on_start(start, length)
    if start == length:
        lora = run.load(length).adapter
        if hooks.sample:
            hooks.sample(length, lora)
        return _trained(run, length, lora)

    state = TrainState(base, job)
    order = _order(job, data)
    if start:
        state.restore(run.load(start))
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
                Step(
                    step=step,
                    num_steps=length,
                    loss=loss,
                    grad_norm=grad_norm,
                    seconds_per_step=seconds,
                )
            )
            if step % job.checkpoint_every == 0:
                run.save(state.checkpoint(step))
    finally:
        # Cancel and errors come here too. Gradients of an unfinished step are dropped: every random
        # number is keyed by its micro-step, so resuming computes them again.
        if step > start and state.lora.is_finite():
            run.save(state.checkpoint(step))
        trained = state.lora.state()
        state.close()
    if hooks.sample:
        hooks.sample(step, trained)
    return _trained(run, length, trained)


def _trained(run: Run, step: int, lora: dict[str, Tensor]) -> Trained:
    return Trained(lora=lora, losses=[float(line["loss"]) for line in run.metrics()], step=step)


class TrainState:
    """All that changes while training: the LoRA, the optimizer, the gradient scaler."""

    def __init__(self, base: LoadedFlux, job: JobSettings) -> None:
        self.settings = job.train
        self.device = base.store.device
        self.dtype = compute_dtype(job.train.compute_dtype, self.device)
        self.transformer = build_transformer(base.store, base.config, self.dtype)
        self.lora: Lora = attach_lora(self.transformer, job.lora, seed=job.train.seed)
        self.transformer.train()
        if job.train.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.parameters = list(self.lora.parameters.values())
        self.optimizer = make_adamw8bit(self.parameters, job.train.learning_rate)
        # float16 gradients underflow without a scale; for other dtypes the scaler does nothing.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )

    def checkpoint(self, step: int) -> Checkpoint:
        tensors, values = optimizer_tensors(self.optimizer)
        all_values = {"optimizer": values, "scaler": self.scaler.state_dict()}
        return Checkpoint(step, self.lora.state(), tensors, all_values)

    def restore(self, checkpoint: Checkpoint) -> None:
        self.lora.load_state(checkpoint.adapter)
        values = checkpoint.values
        load_optimizer_tensors(self.optimizer, checkpoint.optimizer, values["optimizer"])
        self.scaler.load_state_dict(values["scaler"])

    def close(self) -> None:
        """Let go of the network and the optimizer's state, which may be large on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        del self.transformer, self.lora, self.optimizer, self.parameters


def optimizer_step(
    state: TrainState, step: int, order: BatchOrder, data: TrainingData, hooks: Hooks
) -> tuple[float, float]:
    """One optimizer step over all its micro-steps; returns the mean loss and the gradient norm."""
    accumulation = state.settings.gradient_accumulation
    losses = []
    for micro_step in range(step * accumulation, (step + 1) * accumulation):
        hooks.check_stop()
        loss = _forward_backward(state, micro_step, order.batch(micro_step), data)
        losses.append(loss)
    state.scaler.unscale_(state.optimizer)
    grad_norm = nn.utils.clip_grad_norm_(state.parameters, state.settings.max_grad_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return sum(losses) / accumulation, float(grad_norm)


def _forward_backward(
    state: TrainState, micro_step: int, entries: list[LatentEntry], data: TrainingData
) -> float:
    """Add the gradients of one batch; returns its loss."""
    settings = state.settings
    generator = seeded(settings.seed, "micro-step", micro_step)
    latents, prompt_embeds, pooled = data.load(entries, state.device, generator)
    loss = batch_loss(
        state.transformer,
        latents,
        noise=torch.randn(latents.shape, generator=generator).to(state.device),
        sigma=sample_sigmas(len(entries), generator).to(state.device),
        prompt_embeds=prompt_embeds,
        pooled=pooled,
        guidance=settings.guidance,
        dtype=state.dtype,
    ).mean()
    if not torch.isfinite(loss):
        raise ValueError(_diverged(micro_step // settings.gradient_accumulation, settings))
    state.scaler.scale(loss / settings.gradient_accumulation).backward()
    return float(loss.detach())


def batch_loss(
    transformer,
    latents: Tensor,
    *,
    noise: Tensor,
    sigma: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    guidance: float,
    dtype: torch.dtype,
) -> Tensor:
    """Loss [B] of the network on `latents` [B, C, H, W] mixed with `noise` at `sigma` [B]."""
    prediction = velocity(
        transformer,
        add_noise(latents, noise, sigma).to(dtype),
        sigma=sigma,
        prompt_embeds=prompt_embeds,
        pooled=pooled,
        guidance=guidance,
    )
    return flow_loss(prediction, latents, noise)


def _diverged(step: int, settings: TrainSettings) -> str:
    return (
        f"The loss is not a number after {step} steps: the training diverged. Lower the learning "
        f"rate ({settings.learning_rate}), or set the compute dtype to bf16 or fp32. "
        "The state before it was saved."
    )
