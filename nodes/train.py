"""The training node: ComfyUI's side of `trainers.loop`."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers.config import UNITS, JobSettings, Length, TrainSettings
from ..trainers.data import TrainingData
from ..trainers.flow_settings import FlowSettings
from ..trainers.loggers import LOGGERS
from ..trainers.lora_file import LoraTensors, read_lora
from ..trainers.lora_settings import LoraSettings
from ..trainers.optimizer_settings import OptimizerSettings
from ..trainers.preservation_settings import PreservationSettings
from ..trainers.rhythm import NEVER, Rhythm
from ..trainers.speed_settings import SpeedSettings
from ..trainers.status import STATUS_FILE
from . import folders, host
from .inputs import shared_input
from .lora_choice import NONE, checked, lora_file, lora_names, versions
from .native_lora import add_lora
from .session import Asker, Session
from .validation import EncodedPrompt, Sampler, Validation
from .wires import AtelierLatentCache, AtelierPromptCache, AtelierValidation

AUTOMATIC = "automatic"
_SAMPLE_EVERY = 250
_SETTINGS = (
    *("lora_settings", "optimizer_settings", "schedule_settings"),
    *("preservation_settings", "speed_settings"),
)
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
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(
        cls, name: str | None, resume: str | None = AUTOMATIC, assistant: str | None = NONE
    ) -> bool | str:
        try:
            if name is not None:  # a linked input is not known yet
                JobSettings(name=name)
            _run_id(resume or AUTOMATIC)
        except ValueError as error:
            return str(error)
        return checked(assistant)

    @classmethod
    def fingerprint_inputs(
        cls,
        name: str | None = None,
        resume: str | None = AUTOMATIC,
        assistant: str | None = NONE,
        **_: Any,
    ) -> list[Any]:
        """A run that was stopped goes on each time that it is resumed, and ComfyUI may not answer
        from its memory afterwards."""
        if resume in (None, AUTOMATIC):
            return [*folders.runs_that_went_on(name or ""), *versions(assistant)]
        status = folders.fingerprints([folders.atelier_output() / resume / STATUS_FILE])
        return [*status, *versions(assistant)]

    @classmethod
    def execute(cls, model: Any, latents: Any, prompts: Any, **settings: Any) -> io.NodeOutput:
        data = TrainingData(latents=latents, prompts=prompts)
        asker = Asker(node_id=cls.hidden.unique_id, prompt=cls.hidden.prompt)
        run_id = _run_id(settings.get("resume", AUTOMATIC))
        job = _job(settings)
        session = Session(
            model,
            data,
            job,
            asker,
            _validation(settings),
            resume=run_id,
            logger=settings.get("logger", LOGGERS[0]),
            remarks=_not_used(settings, job),
            assistant=_assistant(settings.get("assistant", NONE)),
        )
        result = session.train()
        return io.NodeOutput(
            result.tensors,
            add_lora(model, result.tensors, 1.0),
            result.lora_name,
            {"loss": result.losses},
            host.blocked_output(_NO_SAMPLES) if result.samples is None else result.samples,
            ui={"atelier_run": [result.run_id]},
        )


def _inputs() -> list[Any]:
    return [
        io.Model.Input(
            "model",
            tooltip="The base model, from Load Quantized FLUX, or from ComfyUI's own loaders in "
            "bf16 or fp8. LoRAs that it carries stay as they are, and the new one learns on top.",
        ),
        AtelierLatentCache.Input("latents", tooltip="The encoded pictures, from Cache Latents."),
        AtelierPromptCache.Input("prompts", tooltip="The encoded captions, from Encode Prompts."),
        io.String.Input(
            "name",
            default=JobSettings.name,
            tooltip="Name of the LoRA file and of the run's folder in output/atelier. A short code "
            "of the settings and the steps are added, so that nothing is ever overwritten.",
        ),
        io.Int.Input(
            "length",
            default=Length.amount,
            min=1,
            max=1_000_000,
            tooltip="How long to train, in the unit below. A finished run goes on when this grows.",
        ),
        io.Combo.Input(
            "unit",
            options=["steps", "epochs"],
            default=Length.unit,
            tooltip="steps: updates of the LoRA. epochs: passes over all pictures. The node shows "
            "the other one while it trains.",
        ),
        shared_input("rank"),
        shared_input("targets"),
        io.Float.Input(
            "learning_rate",
            default=TrainSettings.learning_rate,
            min=1e-7,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="Size of a step. 1e-4 is the recipe's for AdamW8bit; 1e-3 is fast and rough. "
            "Prodigy wants 1, Lion 1e-5 to 3e-5.",
        ),
        shared_input("batch_size"),
        shared_input("gradient_accumulation"),
        io.Int.Input(
            "seed",
            default=TrainSettings.seed,
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
        shared_input("activations_in_ram", optional=True, advanced=True),
        AtelierValidation.Input(
            "validation",
            optional=True,
            tooltip="How the training is looked at, from Validation Settings: several prompts and "
            "sizes, held out pictures, a score. In place of vae and positive.",
        ),
        *_run_inputs(),
        *map(shared_input, _SETTINGS),
        host.make_input(
            io.Combo,
            "assistant",
            options=[NONE, *lora_names()],
            default=NONE,
            optional=True,
            advanced=True,
            tooltip="A LoRA that computes along while training, and is off in sample pictures, in "
            "the loss on held out pictures and in the result. For FLUX.1-schnell, whose four steps "
            "a training takes away without its training adapter. Costs its size in memory and a "
            "few percent of time.",
        ),
    ]


def _run_inputs() -> list[Any]:
    return [
        host.make_input(
            io.Combo,
            "resume",
            options=[AUTOMATIC, *folders.run_ids()],
            default=AUTOMATIC,
            optional=True,
            advanced=True,
            tooltip="automatic goes on with the run of these settings, if there is one. Or choose "
            "a run: it must have been trained with the same settings, and goes on even if it was "
            "stopped and kept.",
        ),
        host.make_input(
            io.Combo,
            "checkpoint_unit",
            options=list(UNITS),
            default=JobSettings.checkpoint_unit,
            optional=True,
            advanced=True,
            tooltip="Whether checkpoint_every counts steps or epochs.",
        ),
        host.make_input(
            io.Int,
            "keep_checkpoints",
            default=JobSettings.keep_checkpoints,
            min=0,
            max=1_000_000,
            optional=True,
            advanced=True,
            tooltip="How many of the last checkpoints stay on the disk, beside the one with the "
            "smallest loss on held out pictures. 0 keeps all: then a shorter length is answered "
            "from disk.",
        ),
        host.make_input(
            io.Combo,
            "logger",
            options=list(LOGGERS),
            default=LOGGERS[0],
            optional=True,
            advanced=True,
            tooltip="What else hears of the training: TensorBoard, or Weights & Biases, with or "
            "without the network. Their packages, tensorboard and wandb, must be installed; the "
            "files lie in the run's folder.",
        ),
    ]


def _advanced_inputs() -> list[Any]:
    return [
        host.make_input(
            io.Float,
            "guidance",
            default=TrainSettings.guidance,
            min=0.0,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Guidance given to the model while training. 1 keeps its distillation intact. "
            "FLUX.1-schnell takes none and ignores it.",
        ),
        shared_input("compute_dtype", advanced=True),
        shared_input("gradient_checkpointing", advanced=True),
        host.make_input(
            io.Int,
            "checkpoint_every",
            default=JobSettings.checkpoint_every,
            min=1,
            max=1_000_000,
            advanced=True,
            tooltip="Steps between saved states. One is also saved on Cancel. Does not change the "
            "result.",
        ),
        host.make_input(
            io.Int,
            "sample_every",
            default=_SAMPLE_EVERY,
            min=0,
            max=1_000_000,
            advanced=True,
            tooltip="Steps between sample pictures, the first before training; 0 draws one at the "
            "end. Does not change the result.",
        ),
        host.make_input(
            io.Int,
            "sample_steps",
            default=Sampler.steps,
            min=1,
            max=1000,
            advanced=True,
            tooltip="Sampling steps of each sample picture.",
        ),
        host.make_input(
            io.Int,
            "sample_seed",
            default=Sampler.seed,
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
        lora=settings.get("lora_settings")
        or LoraSettings(rank=settings["rank"], targets=settings["targets"]),
        train=TrainSettings(
            optimizer=settings.get("optimizer_settings") or OptimizerSettings(),
            flow=settings.get("schedule_settings") or FlowSettings(),
            preservation=settings.get("preservation_settings") or PreservationSettings(),
            speed=settings.get("speed_settings") or SpeedSettings(),
            learning_rate=settings["learning_rate"],
            batch_size=settings["batch_size"],
            gradient_accumulation=settings["gradient_accumulation"],
            guidance=settings["guidance"],
            gradient_checkpointing=settings["gradient_checkpointing"],
            compute_dtype=settings["compute_dtype"],
            seed=settings["seed"],
        ),
        checkpoint_every=settings["checkpoint_every"],
        checkpoint_unit=settings.get("checkpoint_unit", JobSettings.checkpoint_unit),
        keep_checkpoints=settings.get("keep_checkpoints", JobSettings.keep_checkpoints),
        activations_in_ram=settings.get("activations_in_ram", False),
    )


def _not_used(settings: dict[str, Any], job: JobSettings) -> list[str]:
    """A sentence if the node's own rank and targets say something else than LoRA Settings."""
    if settings.get("lora_settings") is None:
        return []
    recipe = LoraSettings()
    own = [
        f"{name} ({settings[name]})"
        for name in ("rank", "targets")
        if settings[name] not in (getattr(recipe, name), getattr(job.lora, name))
    ]
    if not own:
        return []
    return [f"Not used here: {' and '.join(own)}. LoRA Settings is connected and says them."]


def _assistant(lora_name: str) -> LoraTensors | None:
    return None if lora_name == NONE else read_lora(lora_file(lora_name))


def _run_id(resume: str) -> str:
    """The id of the chosen run; empty for the one that the settings give."""
    if resume == AUTOMATIC:
        return ""
    if resume not in folders.run_ids():
        raise ValueError(
            f"There is no run {resume!r} any more. Set resume to {AUTOMATIC}, or press R and "
            "choose another."
        )
    return resume


def _validation(settings: dict[str, Any]) -> Validation:
    """That of Validation Settings; without, one prompt from the node's own inputs.

    Raises:
        ValueError: if there are both, or one of the two inputs is missing.
    """
    vae, positive = settings.get("vae"), settings.get("positive")
    validation = settings.get("validation")
    if validation is not None:
        if vae is not None or positive is not None:
            raise ValueError(
                "Train LoRA has a validation, which says how pictures are drawn, and its own vae "
                "or positive beside it. Disconnect vae and positive, or the validation."
            )
        return validation
    if (vae is None) != (positive is None):
        raise ValueError(
            "Sample pictures need both the vae and the positive input of Train LoRA: connect the "
            "other one too, or neither."
        )
    if positive is None:
        return Validation(rhythm=NEVER)
    every = settings["sample_every"]
    # With a CFG of 1 the negative is never computed.
    prompt = EncodedPrompt(name="positive", text="", positive=positive, negative=positive)
    return Validation(
        rhythm=Rhythm(every=every, at_start=every > 0),
        vae=vae,
        prompts=(prompt,),
        sampler=Sampler(steps=settings["sample_steps"], seed=settings["sample_seed"]),
    )
