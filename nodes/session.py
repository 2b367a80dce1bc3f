"""One training inside ComfyUI: the loop between the host's memory, progress and sampling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..trainers import loop
from ..trainers.config import JobSettings, to_json
from ..trainers.control import Control
from ..trainers.data import TrainingData
from ..trainers.devices import describe_device, system_memory
from ..trainers.files import write_json
from ..trainers.flow_remarks import flow_remarks
from ..trainers.hooks import Hooks, Step, Trained, explain
from ..trainers.load import LoadedFlux
from ..trainers.loggers import Logger, LoggerKind, open_logger, require_logger
from ..trainers.lora_file import LoraTensors, read_lora
from ..trainers.lora_settings import without_effect as lora_without_effect
from ..trainers.lora_targets import describe_lora
from ..trainers.plan import Plan
from ..trainers.preflight import require_fits
from ..trainers.preservation import without_effect
from ..trainers.run import PROMPT_FILE, Run
from ..trainers.segments import without_effect as speed_without_effect
from ..trainers.step import start_state
from ..trainers.variants import tell_variant
from . import folders, host, live
from .native import to_training_device
from .native_attention import attention_of
from .samples import Samples
from .score import picture_text_scores
from .trainable import assistant_loras, model_to_train
from .validation import Score, Validation

logger = logging.getLogger("atelier")

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
    run_id: str


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Who asks for a training: the node, and the graph that it is in, in API form."""

    node_id: str
    prompt: dict[str, Any] | None = None


class Session:
    """The training that one execution of the Train LoRA node asks for.

    Args:
        resume: the id of the run to go on with; empty for the one that belongs to the settings.
        logger: what else hears of the training.
        remarks: what the node says about its own inputs.
        assistant: a LoRA that computes along while training, and at no other time.
    """

    def __init__(
        self,
        model: Any,
        data: TrainingData,
        job: JobSettings,
        asker: Asker,
        validation: Validation,
        *,
        resume: str = "",
        logger: LoggerKind = "none",
        remarks: Sequence[str] = (),
        assistant: LoraTensors | None = None,
    ) -> None:
        validation = replace(validation, attention=attention_of(model))
        self._data, self._job, self._validation, self._asker = data, job, validation, asker
        self._trained_on = model_to_train(model)
        self._base = self._trained_on.base
        if assistant is not None:
            loras = assistant_loras(model, self._base, assistant)
            self._base = replace(self._base, assistant=loras)
        self._remarks, self._forecast, self._shown = remarks, list[str](), list[str]()
        validation.check_fits(self._base)
        self._progress = host.Progress()
        self._resumes = bool(resume)
        self._logger_kind, self._logger = logger, Logger()
        self._run: Run = loop.open_run(
            folders.atelier_output(), job, self._base, data, resume=resume
        )
        self._steps_per_epoch = loop.steps_per_epoch(job, data)
        self._reporter = live.Reporter(self._run.name, asker.node_id)
        # The entry with the smallest key: the order of the files must not change the pictures.
        sampled = min(data.latents.entries, key=lambda entry: entry.name)
        size = (sampled.width, sampled.height)
        self._score_key = validation.score_key(size)
        folder = self._run.folder / "samples"
        self._samples = Samples(folder, model, job.lora, validation, size, self._reporter.preview)

    def train(self) -> Result:
        """Train, or take the finished run from disk; write the LoRA file; draw the last picture."""
        control = Control()
        try:
            with (
                live.findable(self._run.name, control),
                host.ended_before_exit(),
                host.training_mode(),
            ):
                hooks = self._hooks(control)
                trained = loop.train(
                    self._run, self._base, self._data, self._job, hooks, go_on=self._resumes
                )
                self._tell_if_stopped(trained.step)
                path = self._write_lora(trained)
                self._draw_what_is_due(trained)
        except Exception as error:
            if not host.is_out_of_memory(error):
                raise
            host.free_device_memory()
            raise ValueError(self._out_of_memory()) from error
        finally:
            self._logger.close()
        samples = self._samples.tensor(trained.step) if self._validation.draws else None
        return Result(read_lora(path), path.name, trained.losses, samples, self._run.name)

    def _hooks(self, control: Control) -> Hooks:
        return Hooks(
            control=control,
            check_stop=host.check_interrupted,
            explain=self._explain,
            before_start=self._check,
            on_start=self._on_start,
            on_step=self._on_step,
            on_measure=self._on_measure,
            on_warning=self._on_warning,
            on_status=self._reporter.status,
            on_pause=host.free_device_memory,
            take_device=self._take_device,
            keep=self._write_lora,
            sample=self._sample_and_go_on if self._validation.draws else None,
            held_out=self._validation.held_out,
            validation=self._validation.rhythm,
            node=self._asker.node_id,
        )

    def _tell_if_stopped(self, step: int) -> None:
        length = self._job.length.num_steps(self._steps_per_epoch)
        if step < length:
            self._reporter.state = "stopped"
            text = f"Stopped and kept at step {step} of {length}. Resume trains it to its length."
            host.show_text(text, self._asker.node_id)

    def _write_lora(self, trained: Trained) -> Path:
        path = loop.save_trained(folders.lora_folder(), trained, self._run, self._base)
        logger.info("LoRA of step %d: %s", trained.step, path)
        self._reporter.changed()
        return path

    def _draw_what_is_due(self, trained: Trained) -> None:
        """The pictures of the end; and, if what is drawn was changed, those of the start and of the
        checkpoints."""
        if not self._validation.draws:
            return
        rhythm = self._validation.rhythm
        scored = None if self._validation.score is None else self._run.scores()
        for step in (0, *self._run.steps_saved()):
            is_due = step < trained.step and rhythm.is_due(step, self._steps_per_epoch)
            is_new = self._samples.missing(step) or (scored is not None and step not in scored)
            if is_due and is_new:
                self._sample(step, self._lora_at(step))
        if rhythm.at_end or min(self._samples.steps_drawn(), default=trained.step) >= trained.step:
            self._sample(trained.step, trained.lora)

    def _lora_at(self, step: int) -> dict[str, Tensor]:
        if step:
            return self._run.load(step).adapter
        return start_state(self._base, self._job)

    def _explain(self, error: BaseException) -> str | None:
        if host.is_cancel(error):
            return None
        return self._out_of_memory() if host.is_out_of_memory(error) else explain(error)

    def _out_of_memory(self) -> str:
        is_ours = isinstance(self._base, LoadedFlux)
        return _OUT_OF_MEMORY if is_ours else _OUT_OF_MEMORY_FROM_CORE

    def _take_device(self) -> None:
        """Ask the host to have the base model on the device, and room for the training."""
        to_training_device(self._trained_on.load(), self._plan().needed.beside_weights)

    def _plan(self) -> Plan:
        device = host.compute_device()
        workload = loop.workload(self._job, self._base, self._data, device)
        plan = Plan.of(self._base, workload, device)
        return replace(plan, other_copy=self._trained_on.other_copy)

    def _check(self) -> None:
        """Refuse what cannot work, before anything is written."""
        require_logger(self._logger_kind)
        self._trained_on.require_memory()
        plan = self._plan()
        lines = require_fits(plan, host.free_memory(), system_memory())
        size = describe_lora(self._base.config, self._job.lora)
        self._forecast = [size, *lines, describe_device(plan.device)]

    def _on_start(self, step: int, num_steps: int) -> None:
        is_trained = bool(self._forecast)  # made before a training
        if self._score_key:
            self._run.forget_measures("score", keep=self._score_key)
        lines = [f"{num_steps} steps = {num_steps / self._steps_per_epoch:.1f} epochs."]
        if 0 < step < num_steps:
            lines.append(f"The run goes on from step {step}.")
        if self._base.frozen:
            lines.append("The LoRAs on this MODEL stay as they are: the new one learns on top.")
        if self._base.assistant:
            lines.append("The assistant computes along in the training, and at no other time.")
        if not host.is_deterministic():
            lines.append("A resumed run is close to an unbroken one, not equal bit for bit.")
        lines += [*self._remarks, *self._without_effect()]
        if is_trained:
            cfg = self._validation.sampler.cfg
            lines += tell_variant(self._base, self._job, self._data, cfg)
        if self._data.prompts.has_masks and self._validation.shows_padding:
            lines.append(
                "The captions hide their padding, and the prompts of the sample pictures do not: "
                "turn mask_padding of Validation Settings on, or encode them with CLIP Text Encode "
                "(Hidden Padding)."
            )
        if count := self._num_held_out_and_trained():
            lines.append(
                f"{count} of the held out pictures are trained too: the loss on them also falls "
                "when the LoRA only learns by heart."
            )
        if is_trained:
            lines += [*self._trained_on.sentences, *self._forecast]
        self._shown = lines
        host.show_text("\n".join(lines), self._asker.node_id)
        self._write_prompt()  # also when the answer is on disk: what is looked at may be new
        if is_trained:
            logger.info("training %s, step %d to %d", self._run.name, step, num_steps)
            self._open_logger(step)

    def _open_logger(self, step: int) -> None:
        self._logger = open_logger(
            self._logger_kind,
            self._run.folder,
            name=self._job.name,
            run_id=self._run.name,
            config=to_json(self._job),
            start_step=step,
        )

    def _write_prompt(self) -> None:
        """Keep the graph, so that the run can be queued again from its folder."""
        prompt, node = self._asker.prompt, self._asker.node_id
        if prompt is not None:
            write_json(self._run.folder / PROMPT_FILE, {"node": node, "prompt": prompt})

    def _without_effect(self) -> list[str]:
        """A sentence for every setting that was changed and does nothing here."""
        train, device = self._job.train, host.compute_device().type
        lines = [
            *lora_without_effect(self._job.lora),
            *speed_without_effect(train.speed, gradient_checkpointing=train.gradient_checkpointing),
            *train.optimizer.remarks(train.learning_rate, device),
            *flow_remarks(
                train,
                takes_guidance=self._base.config.guidance,
                num_steps=self._job.length.num_steps(self._steps_per_epoch),
            ),
        ]
        if self._job.activations_in_ram and host.compute_device().type == "cpu":
            lines.append("The setting activations_in_ram has no effect: a CPU computes in RAM.")
        return [*lines, *without_effect(self._job.train.preservation, self._data)]

    def _num_held_out_and_trained(self) -> int:
        if self._validation.held_out is None:
            return 0
        trained = {entry.record for entry in self._data.latents.entries}
        return sum(e.record in trained for e in self._validation.held_out.latents.entries)

    def _on_step(self, step: Step) -> None:
        self._reporter.step(step)
        self._progress.show(step.step, step.num_steps)
        numbers = {name: value for name, value in step.metrics().items() if value is not None}
        self._logger.log(step.step, numbers | step.parts)

    def _on_warning(self, sentence: str) -> None:
        logger.warning(sentence)
        self._shown.append(sentence)
        host.show_text("\n".join(self._shown), self._asker.node_id)

    def _on_measure(self, step: int, values: dict[str, float]) -> None:
        self._logger.log(step, values)
        self._reporter.changed()

    def _sample_and_go_on(self, step: int, lora: dict[str, Tensor]) -> None:
        self._sample(step, lora)
        self._take_device()

    def _sample(self, step: int, lora: dict[str, Tensor]) -> None:
        is_new, score = bool(self._samples.missing(step)), self._validation.score
        for picture, path in self._samples.draw(step, lora):
            self._logger.log_picture(step, picture.prompt.name, path)
        if score is not None and (is_new or step not in self._run.scores()):
            mean = self._mean_score(score, step)
            self._run.log_score(step, mean, of=self._score_key)
            self._logger.log(step, {"score": mean})
        self._reporter.changed()

    def _mean_score(self, score: Score, step: int) -> float:
        """Of all pictures of a step, also of those that were drawn before a crash."""
        scores = [
            value
            for picture, pixels in self._samples.of(step)
            for value in picture_text_scores(
                score.vision, score.text, pixels[None], [picture.prompt.text]
            )
        ]
        return sum(scores) / len(scores)
