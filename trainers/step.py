"""One optimizer step: the network, the LoRA, the optimizer, and the gradients of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from .adapters import Lora, attach_lora
from .batches import BatchOrder
from .blocks import BlockRunner
from .caches import LatentEntry
from .compiled import compile_blocks, require_compiler
from .config import JobSettings
from .data import TrainingBatch, TrainingData
from .devices import compute_dtype, dtype_name, give_back_memory, require_trainable_on
from .draws import Draw, draw, trained_config
from .eight_bit import require_products
from .ema import ShownWeights
from .flow import flow_target, seeded
from .flux import build_transformer, multiply_in_8_bits, velocity
from .learning_rates import rate_factor
from .load import BaseFlux
from .losses import training_loss
from .optimizer_state import load_optimizer_tensors, optimizer_tensors
from .optimizers import (
    cast_parameters,
    clip_gradients,
    make_optimizer,
    own_draws,
    rate_of,
    set_rate,
)
from .preservation import (
    Losses,
    Part,
    class_captions,
    kind_and_weight,
    mask_weights,
    mean_losses,
)
from .run import Checkpoint
from .segments import Segment, segments_of
from .tread import forced_tokens
from .watch import diverged

_LARGE_BYTES = 1 << 30
_TRAINED = "trained/"
"""Before the names of the trained weights in a checkpoint whose adapter is another one."""


class TrainState:
    """All that changes while training: the LoRA, the optimizer, the gradient scaler.

    Args:
        num_steps: the length of the run, for schedules of the learning rate that follow it.
    """

    def __init__(
        self,
        base: BaseFlux,
        job: JobSettings,
        saved: Checkpoint | None = None,
        *,
        num_steps: int = 0,
    ) -> None:
        self.settings, self.num_steps = job.train, num_steps
        self.activations_in_ram = job.activations_in_ram
        self.device = base.store.device
        require_trainable_on(self.device, job.train.optimizer.optimizer)
        require_products(job.train.speed.products, self.device, base.format)
        # Between forward and backward on a CPU, whose passes each leave holes in the heap: 1 GB for
        # FLUX.1-dev. Small networks leave little, and would pay 7 % of their step.
        self.gives_back_memory = self.device.type == "cpu" and base.store.num_bytes > _LARGE_BYTES
        # A run keeps the dtype it began with, wherever "auto" would lead now.
        name = saved.values["compute_dtype"] if saved else job.train.compute_dtype
        self.dtype = compute_dtype(name, self.device)
        config = trained_config(base.config, job.train.flow)
        self.transformer = build_transformer(
            base.store, config, self.dtype, base.frozen, base.assistant
        )
        if job.train.speed.products == "8bit":
            multiply_in_8_bits(self.transformer)
        adapter = saved.adapter if saved else None
        self.lora: Lora = attach_lora(
            self.transformer, job.lora, seed=job.train.seed, base=base, saved=adapter
        )
        self.transformer.train()
        if job.train.speed.compile:
            require_compiler(self.device)
            compile_blocks(self.transformer)
        self.num_blocks = base.config.num_blocks
        self.blocks = BlockRunner(self.transformer, self._segments(kept_blocks=0))
        self.parameters = list(self.lora.parameters.values())
        cast_parameters(job.train.optimizer, self.parameters)
        self.lora.take_off_start()
        self.optimizer = make_optimizer(
            job.train.optimizer, self.lora.parameters, job.train.learning_rate
        )
        # float16 gradients underflow without a scale; for other dtypes the scaler does nothing.
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.dtype == torch.float16, init_scale=2.0**12
        )
        if saved:
            self.lora.load_state(saved.adapter)
        self.shown = ShownWeights(job.train.optimizer, self.parameters, self.optimizer)
        if saved:
            self._restore(saved)

    def set_learning_rate(self, step: int) -> float:
        """For the step that has `step` others before it; returns it."""
        set_rate(self.optimizer, rate_factor(self.settings.optimizer, step, self.num_steps))
        return rate_of(self.optimizer)

    def shown_lora(self) -> dict[str, Tensor]:
        """Copies on the CPU of the LoRA's tensors as they are shown and saved."""
        with self.shown.in_place():
            return self.lora.state()

    def checkpoint(self, step: int) -> Checkpoint:
        tensors, values = optimizer_tensors(self.optimizer)
        if not self.shown.are_trained:
            trained = self.lora.state()
            tensors |= {f"{_TRAINED}{name}": tensor for name, tensor in trained.items()}
        all_values = {
            "compute_dtype": dtype_name(self.dtype),
            "optimizer": values,
            "scaler": self.scaler.state_dict(),
        }
        return Checkpoint(step, self.shown_lora(), tensors, all_values)

    def _restore(self, checkpoint: Checkpoint) -> None:
        tensors, values = dict(checkpoint.optimizer), checkpoint.values
        trained = {
            name.removeprefix(_TRAINED): tensors.pop(name)
            for name in checkpoint.optimizer
            if name.startswith(_TRAINED)
        }
        if trained:
            self.lora.load_state(trained)
        load_optimizer_tensors(self.optimizer, tensors, values["optimizer"])
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
        del self.transformer, self.blocks, self.lora, self.optimizer, self.shown, self.parameters


def start_state(base: BaseFlux, job: JobSettings) -> dict[str, Tensor]:
    """The LoRA's tensors before the first step."""
    transformer = build_transformer(base.store, base.config, torch.float32, base.frozen)
    return attach_lora(transformer, job.lora, seed=job.train.seed, base=base).state()


def optimizer_step(
    state: TrainState,
    step: int,
    order: BatchOrder,
    data: TrainingData,
    check_stop: Callable[[], None] = lambda: None,
) -> tuple[Losses, float | None]:
    """One optimizer step over all its micro-steps: the mean losses, and the gradient norm, which is
    None when float16 overflowed and the step is left out.

    Args:
        check_stop: called before every micro-step; it raises to stop.

    Raises:
        ValueError: if the loss or a gradient is not a number; the weights are untouched.
    """
    accumulation = state.settings.gradient_accumulation
    parts = []
    for micro_step in range(step * accumulation, (step + 1) * accumulation):
        check_stop()
        parts += _forward_backward(state, micro_step, order.batch(micro_step), data)
    state.scaler.unscale_(state.optimizer)
    grad_norm = clip_gradients(state.settings.optimizer, state.parameters)
    is_finite = math.isfinite(grad_norm)
    # A scale of 1 or less scales nothing up: then it is not the scale that overflows.
    if not is_finite and (not state.scaler.is_enabled() or state.scaler.get_scale() <= 1):
        raise diverged(step, state.settings, state.dtype)
    state.set_learning_rate(step)
    with own_draws(state.settings.seed, step, state.device):
        state.scaler.step(state.optimizer)
    state.shown.update(step)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return mean_losses(parts, accumulation), grad_norm if is_finite else None


def _forward_backward(
    state: TrainState, micro_step: int, entries: list[LatentEntry], data: TrainingData
) -> list[Part]:
    """Add the gradients of one batch; returns its losses."""
    settings = state.settings
    state.lora.at_micro_step(micro_step)
    generator = seeded(settings.seed, "micro-step", micro_step)
    # Draws of their own: another caption or a flip trains with the same noise.
    samples = data.choose(entries, seeded(settings.seed, "choice", micro_step))
    batch = data.load(samples, state.device, generator)
    drawn = draw(settings, batch.latents, generator, micro_step, partial(_predict, state, batch))
    target = _target(state, entries, batch, drawn)
    with state.saving(), state.routed(micro_step, batch):
        prediction = _predict(state, batch, drawn)
        weights = mask_weights(settings.preservation, batch.weights)
        loss = training_loss(settings.flow.loss, prediction, target, drawn.sigma, weights).mean()
    parts = [_backward(state, micro_step, loss, *kind_and_weight(settings.preservation, entries))]
    if classes := class_captions(settings.preservation, samples):
        loss = _class_loss(state, data.with_texts(batch, classes.texts), drawn, classes.rows)
        weight = settings.preservation.class_weight
        parts.append(_backward(state, micro_step, loss, "class", weight))
    return parts


def _backward(state: TrainState, micro_step: int, loss: Tensor, kind: str, weight: float) -> Part:
    """Add the gradients of a loss times its weight."""
    settings = state.settings
    if not torch.isfinite(loss):
        step = micro_step // settings.gradient_accumulation
        raise diverged(step, settings, state.dtype)
    if state.gives_back_memory:
        give_back_memory()
    state.scaler.scale(loss * weight / settings.gradient_accumulation).backward()
    return Part(kind, float(loss.detach()), weight)


def _target(
    state: TrainState, entries: list[LatentEntry], batch: TrainingBatch, drawn: Draw
) -> Tensor:
    """The velocity [B, C, h, w] to learn: that of the straight path to the pictures; of
    regularization pictures, as are all of a batch, that of the model without the LoRA."""
    if entries[0].is_regularization:
        return _taught(state, batch, drawn)
    return flow_target(batch.latents, drawn.noise)


def _class_loss(state: TrainState, batch: TrainingBatch, drawn: Draw, rows: Tensor) -> Tensor:
    """How far the LoRA moves what is drawn for class captions: of the `rows` [B] that are 1."""
    target = _taught(state, batch, drawn)
    with state.saving():
        prediction = _predict(state, batch, drawn)
        losses = training_loss(state.settings.flow.loss, prediction, target, drawn.sigma)
    return (losses * rows.to(losses)).mean()


def _taught(state: TrainState, batch: TrainingBatch, drawn: Draw) -> Tensor:
    """The velocity [B, C, h, w] of the model without the LoRA."""
    with state.lora.disabled(), torch.no_grad():
        return _predict(state, batch, drawn)


def _predict(state: TrainState, batch: TrainingBatch, drawn: Draw) -> Tensor:
    """The velocity [B, C, h, w] of the network."""
    return velocity(
        state.transformer,
        drawn.noisy.to(state.dtype),
        sigma=drawn.sigma,
        prompt_embeds=batch.prompt_embeds,
        pooled=batch.pooled,
        guidance=drawn.guidance,
        text_mask=batch.text_mask,
        reference=batch.reference,
    )
