"""The training loop. Read `train` from top to bottom; everything it calls is a page of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from .adapters import file_tensors, lora_metadata, save_lora
from .batches import BatchOrder
from .blocks import require_speed
from .config import JobSettings, to_json
from .data import TrainingData
from .devices import compute_dtype, free_bytes, memory_in_use
from .differences import different_run
from .evaluate import held_out_key, held_out_loss, predict_by
from .files import clear_leftovers
from .flux import without_assistant
from .frozen import fingerprint, frozen_bytes
from .hooks import Hooks, Step, Trained
from .load import BaseFlux
from .lora_init import require_start
from .memory import Workload, most_kept_blocks
from .optimizers import require_optimizer
from .preservation import require_class_captions
from .rhythm import Rhythm
from .run import ASSISTANT_FILE, FROZEN_FILE, Run, run_name
from .run_identity import RunIdentity
from .segments import slower_than_wished
from .status import State, Status
from .step import TrainState, optimizer_step
from .watch import Diverged, Watch, never_trained, no_progress

_SMOOTHING = 0.9
"""Of the seconds per step: the weight of the steps before."""


def open_run(
    root: Path, job: JobSettings, base: BaseFlux, data: TrainingData, *, resume: str = ""
) -> Run:
    """The run folder that this job, model and data belong to.

    Args:
        resume: the id of the run that it must be, whatever its name; empty for any.

    Raises:
        ValueError: if that run is of another job, model or data, or does not exist.
    """
    if resume:
        job = dataclasses.replace(job, name=run_name(resume))
    identity = RunIdentity(
        base=base.identity,
        base_format=base.format,
        latents=data.latents.fingerprint(),
        prompts=data.prompts.fingerprint(),
        job=job,
        frozen=fingerprint(base.frozen),
        assistant=fingerprint(base.assistant),
        num_steps=_length(job, data) if job.train.optimizer.needs_length else 0,
    )
    manifest = {
        "model": base.path,
        "format": base.format,
        "block_streaming": base.store.streaming,
        "latents": data.latents.to_json(),
        "prompts": data.prompts.to_json(),
        "settings": to_json(job),
    }
    loras = {FROZEN_FILE: base.frozen, ASSISTANT_FILE: base.assistant}
    manifest |= {Path(name).stem: name for name, some in loras.items() if some}
    run = Run(root, identity, manifest, loras)
    if resume and run.name != resume:
        raise ValueError(different_run(root / resume, identity, manifest))
    return run


def steps_per_epoch(job: JobSettings, data: TrainingData) -> float:
    """Optimizer steps of one pass over the data; a step may reach over the end of an epoch."""
    return _order(job, data).batches_per_epoch / job.train.gradient_accumulation


def _length(job: JobSettings, data: TrainingData) -> int:
    """Optimizer steps of the whole run."""
    return job.length.num_steps(steps_per_epoch(job, data))


def workload(
    job: JobSettings, base: BaseFlux, data: TrainingData, device: torch.device
) -> Workload:
    """What the largest micro-step of a job computes, to estimate its memory."""
    largest, count = _order(job, data).largest_batch(data.prompts.length)
    dtype, speed = compute_dtype(job.train.compute_dtype, device), job.train.speed
    if job.train.preservation.keeps_class:  # class captions are computed without a route
        speed = dataclasses.replace(speed, tread=())
    return Workload(
        width=largest.width,
        height=largest.height,
        reference_width=largest.reference_width,
        reference_height=largest.reference_height,
        prompt_length=data.prompts.length,
        is_masked=data.prompts.has_masks,
        batch_size=count,
        lora=job.lora,
        dtype=dtype,
        gradient_checkpointing=job.train.gradient_checkpointing,
        accumulates=job.train.gradient_accumulation > 1 or job.train.preservation.keeps_class,
        activations_in_ram=job.activations_in_ram,
        frozen_bytes=frozen_bytes((*base.frozen, *base.assistant), dtype),
        optimizer=job.train.optimizer.on(device.type),
        speed=speed,
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
    run: Run,
    base: BaseFlux,
    data: TrainingData,
    job: JobSettings,
    hooks: Hooks | None = None,
    *,
    go_on: bool = False,
) -> Trained:
    """Train a LoRA on the store's device until the job's length, from where the run stands.

    A run that already has that length, or was stopped and kept on the way to it, is answered from
    disk. Whatever ends the loop, the state after the last whole optimizer step is saved first.

    Args:
        go_on: train a run that was stopped and kept to its length.

    Raises:
        ValueError: for settings that do not fit the model or the data, a loss that diverged, or a
            run that another process trains.
    """
    hooks = hooks or Hooks()
    length = _length(job, data)
    end = run.finished_at(length, go_on=go_on)
    if end is not None:
        return _from_disk(run, end, hooks)

    job.train.optimizer.check_length(length)
    dtype = compute_dtype(job.train.compute_dtype, base.store.device)
    require_optimizer(job.train.optimizer, job.lora.kind, dtype)
    if not run.steps_saved():
        require_start(job.lora, base)
    data.check_fits(base.config)
    require_class_captions(job.train.preservation, data)
    require_speed(job.train.speed, base.config.num_blocks)
    hooks.before_start()
    with run.locked():
        end = run.finished_at(length, go_on=go_on)  # another process may have trained until now
        if end is not None:
            return _from_disk(run, end, hooks)
        start = run.start_step(length)
        hooks.on_start(start, length)
        run.create()
        for sentence in _told(job, data, length):
            hooks.on_warning(sentence)
        run.forget_metrics_after(start)
        if hooks.held_out is not None:
            run.forget_measures("eval_loss", keep=held_out_key(hooks.held_out))
        training = _Training(run, base, data, job, hooks, start, length)
        with training.recorded():
            training.look()
            while not training.is_over():
                training.advance()
                training.look()
            training.finish()
    return training.outcome()


def _told(job: JobSettings, data: TrainingData, length: int) -> Iterator[str]:
    """What a user should hear of settings and data together."""
    yield from never_trained(data.latents.subsets, length)
    has_masks = any(entry.masks for entry in data.latents.entries)
    yield from slower_than_wished(job.train.speed, dropout=job.lora.dropout, has_masks=has_masks)


def _from_disk(run: Run, step: int, hooks: Hooks) -> Trained:
    hooks.on_start(step, step)
    return Trained(lora=run.load(step).adapter, losses=run.losses(step), step=step)


class _Training:
    """A run in progress: the state that changes, and what is done at a step and between two."""

    def __init__(
        self,
        run: Run,
        base: BaseFlux,
        data: TrainingData,
        job: JobSettings,
        hooks: Hooks,
        start: int,
        length: int,
    ) -> None:
        self.run, self.base, self.data, self.job, self.hooks = run, base, data, job, hooks
        self.step, self.saved, self.length = start, start, length
        self.order = _order(job, data)
        self.steps_per_epoch = steps_per_epoch(job, data)
        self.watch = Watch(
            start,
            job.train,
            is_all_regularization=all(e.is_regularization for e in data.latents.entries),
        )
        self.checkpoints = Rhythm(every=job.checkpoint_every, unit=job.checkpoint_unit)
        self.seconds_per_step: float | None = None
        self.started = time.time()
        self.went_on = run.is_going_on()
        self.state: TrainState | None = None
        self.lora: dict[str, Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Save what is trained when the inside ends in whatever way, and say on disk which it was.

        Gradients of an unfinished step are dropped: every random number is keyed by its micro-step,
        so resuming computes them again.
        """
        try:
            try:
                self._begin()
                yield
            except Diverged:  # what led there is saved too, but in no other checkpoint's place
                self.job = dataclasses.replace(self.job, keep_checkpoints=0)
                raise
            finally:
                self._let_go()
        except BaseException as error:
            sentence = self.hooks.explain(error)
            with suppress(ValueError):  # the disk may be what ended it
                self._report("cancelled" if sentence is None else "failed", sentence)
            raise
        self._report("finished" if self.step == self.length else "stopped")

    def is_over(self) -> bool:
        """At its length, or when it was asked to stop after at least one step."""
        is_stopped = self.step > 0 and self.hooks.control.is_asked("stop")
        return self.step == self.length or is_stopped

    def advance(self) -> None:
        """One optimizer step, its line in the metrics, its checkpoint if it is time for one."""
        began = time.perf_counter()
        state = self._on_device()
        learning_rate = state.set_learning_rate(self.step)
        losses, grad_norm = optimizer_step(
            state, self.step, self.order, self.data, self.hooks.check_stop
        )
        seconds = time.perf_counter() - began
        before = self.seconds_per_step or seconds
        self.seconds_per_step = _SMOOTHING * before + (1 - _SMOOTHING) * seconds
        self.step += 1
        memory, ram = memory_in_use(state.device)
        step = Step(
            step=self.step,
            num_steps=self.length,
            loss=losses.loss,
            parts=losses.parts,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            seconds=seconds,
            seconds_per_step=self.seconds_per_step,
            memory=memory,
            ram=ram,
        )
        self.run.log(step.metrics() | step.parts)
        self.hooks.on_step(step)
        self.watch.see(self.step, grad_norm, state.parameters, losses.kinds)
        if self.checkpoints.is_due(self.step, self.steps_per_epoch):
            self._save()

    def look(self) -> None:
        """Between two steps: the validation if it is due, and what was asked for."""
        control = self.hooks.control
        is_due = self.hooks.validation.is_due(self.step, self.steps_per_epoch)
        if is_due:
            self._evaluate()
        if control.take("save"):
            self._save()
            self.hooks.keep(self.outcome())
        if self.is_over():
            return
        if self.hooks.sample and (control.take("sample") or is_due):
            self.hooks.sample(self.step, self._on_device().shown_lora())
            self._keep_what_fits()
        if control.take("pause"):
            self._pause()

    def finish(self) -> None:
        """The loss of the end, also when it was stopped in a pause or while a picture was drawn."""
        if self.hooks.held_out is not None and self.hooks.validation.at_end:
            if self.state is None:
                self._begin()
            self._evaluate()

    def outcome(self) -> Trained:
        """What is trained by now."""
        lora = self.state.shown_lora() if self.state else self.lora
        return Trained(lora=lora, losses=self.run.losses(self.step), step=self.step)

    def _evaluate(self) -> None:
        """Measure the loss on the held out samples, once for each step, and keep the best."""
        if self.hooks.held_out is None or self.step in self.run.eval_losses():
            return
        state = self._on_device()
        predict = predict_by(state.transformer, guidance=self.job.train.guidance, dtype=state.dtype)
        with without_assistant(state.transformer), state.shown.in_place():
            loss = held_out_loss(
                predict, self.hooks.held_out, device=state.device, check_stop=self.hooks.check_stop
            )
        key = held_out_key(self.hooks.held_out)
        self.run.log({"step": self.step, "eval_loss": loss, "of": key})
        self.hooks.on_measure(self.step, {"eval_loss": loss})
        if self.run.best_step() == self.step:
            self._save()
        if sentence := no_progress(self.run.eval_losses()):
            self.hooks.on_warning(sentence)

    def _pause(self) -> None:
        """Wait without anything on the device. What was saved goes on to the same bits."""
        self._let_go()
        self.hooks.on_pause()
        self._report("paused")
        self.hooks.control.wait_while_paused(self.hooks.check_stop)
        if not self.is_over():
            self._begin()

    def _begin(self) -> None:
        """Take the device, with the state of the last step."""
        self.hooks.take_device()
        saved = self.run.load(self.step) if self.step else None
        self.state = TrainState(self.base, self.job, saved, num_steps=self.length)
        self._keep_what_fits()
        self._report("training")

    def _keep_what_fits(self) -> None:
        """With selective checkpointing, spend the memory that is free now on activations."""
        state = self._on_device()
        free = free_bytes(state.device)
        if free is not None:
            work = workload(self.job, self.base, self.data, state.device)
            kept = most_kept_blocks(self.base.config, self.base.format, work, free)
            state.keep_activations(kept)

    def _on_device(self) -> TrainState:
        assert self.state is not None  # only a pause has none
        return self.state

    def _save(self) -> None:
        """Save the state, unless nothing is new, or it is spoilt: resuming from that would never
        recover. What need not be kept goes also then: a crash may have left it."""
        state = self._on_device()
        if self.step > self.saved and state.lora.is_finite():
            self.run.save(state.checkpoint(self.step))
            self.saved = self.step
        self.run.keep_checkpoints(self.job.keep_checkpoints)

    def _let_go(self) -> None:
        """Save, and free what the training holds on the device."""
        if self.state is None:
            return
        self.lora = self.state.shown_lora()
        try:
            self._save()
        finally:
            self.state.close()
            self.state = None

    def _report(self, state: State, error: str | None = None) -> None:
        status = Status(
            state=state,
            step=self.step,
            num_steps=self.length,
            started=self.started,
            updated=time.time(),
            error=error,
            lora=self.run.lora_name(),
            node=self.hooks.node,
            can_sample=self.hooks.sample is not None,
            went_on=self.went_on,
        )
        self.run.write_status(status)
        self.hooks.on_status(status)


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
    clear_leftovers(path)
    save_lora(path, file_tensors(trained.lora, job.lora), metadata)
    run.note_lora(path.name, trained.step)
    return path
