"""One optimizer step: the network, the LoRA, the optimizer, and the gradients of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

from .adapters import Lora, attach_lora
from .batches import BatchOrder
from .blocks import BlockRunner, Segment, segments_of
from .caches import LatentEntry
from .config import JobSettings, TrainSettings
from .data import TrainingBatch, TrainingData
from .devices import compute_dtype, dtype_name, give_back_memory, require_trainable_on
from .draws import Draw, draw
from .flow import flow_target, seeded
from .flux import build_transformer, velocity
from .load import BaseFlux
from .losses import training_loss
from .optimizers import load_optimizer_tensors, make_adamw8bit, optimizer_tensors
from .run import Checkpoint
from .tread import forced_tokens

_LARGE_BYTES = 1 << 30


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
        self.num_blocks = base.config.num_blocks
        self.blocks = BlockRunner(self.transformer, self._segments(kept_blocks=0))
        self.parameters = list(self.lora.parameters.values())
        self.optimizer = make_adamw8bit(self.parameters, job.train.learning_rate)
        # float16 gradients underflow without a scale; for other dtypes the scaler does nothing.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )
        if saved:
            self._restore(saved)

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return self.optimizer.param_groups[0]["lr"]

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

    def keep_activations(self, num_blocks: int) -> None:
        """Of so many blocks keep them, with selective checkpointing: the result is the same."""
        self.blocks.segments = self._segments(kept_blocks=num_blocks)

    def _segments(self, *, kept_blocks: int) -> tuple[Segment, ...]:
        return segments_of(
            self.settings.speed,
            self.num_blocks,
            gradient_checkpointing=self.settings.gradient_checkpointing,
            kept_blocks=kept_blocks,
        )

    def routed(self, micro_step: int, batch: TrainingBatch) -> AbstractContextManager:
        """Within it, the image tokens of this micro-step go around blocks."""
        if not self.settings.speed.tread:
            return nullcontext()
        generator = seeded(self.settings.seed, "tread", micro_step)
        return self.blocks.routed(generator, forced_tokens(batch.weights))

    def saving(self) -> AbstractContextManager:
        """Where autograd keeps what backward needs of the forward pass within it."""
        if not self.activations_in_ram:
            return nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def close(self) -> None:
        """Let go of the network and the optimizer's state, which may be large on the device."""
        self.optimizer.zero_grad(set_to_none=True)
        del self.transformer, self.blocks, self.lora, self.optimizer, self.parameters


def optimizer_step(
    state: TrainState,
    step: int,
    order: BatchOrder,
    data: TrainingData,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[float, float | None]:
    """One optimizer step over all its micro-steps: the mean loss, and the gradient norm, which is
    None when float16 overflowed and the step is left out.

    Args:
        check_stop: called before every micro-step; it raises to stop.

    Raises:
        ValueError: if the loss or a gradient is not a number; the weights are untouched.
    """
    accumulation = state.settings.gradient_accumulation
    losses = []
    for micro_step in range(step * accumulation, (step + 1) * accumulation):
        check_stop()
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
    drawn = draw(settings, batch.latents, generator)
    target = _target(state, entries, batch, drawn)
    with state.saving(), state.routed(micro_step, batch):
        prediction = _predict(state, batch, drawn)
        loss = training_loss(
            settings.flow.loss, prediction, target, drawn.sigma, batch.weights
        ).mean()
    if not torch.isfinite(loss):
        raise ValueError(_diverged(micro_step // settings.gradient_accumulation, settings))
    if state.gives_back_memory:
        give_back_memory()
    state.scaler.scale(loss / settings.gradient_accumulation).backward()
    return float(loss.detach())


def _target(
    state: TrainState, entries: list[LatentEntry], batch: TrainingBatch, drawn: Draw
) -> Tensor:
    """The velocity [B, C, h, w] to learn: that of the straight path to the pictures; of
    regularization pictures, as are all of a batch, that of the model without the LoRA."""
    if entries[0].is_regularization:
        with state.lora.disabled(), torch.no_grad():
            return _predict(state, batch, drawn)
    return flow_target(batch.latents, drawn.noise)


def _predict(state: TrainState, batch: TrainingBatch, drawn: Draw) -> Tensor:
    """The velocity [B, C, h, w] of the network."""
    return velocity(
        state.transformer,
        drawn.noisy.to(state.dtype),
        sigma=drawn.sigma,
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
