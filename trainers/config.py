"""Every setting of a training job: frozen, keyword-only, checked when made, JSON and back."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from .checks import require
from .flow_settings import FlowSettings
from .lora_settings import LoraSettings
from .optimizer_settings import OptimizerSettings
from .preservation_settings import PreservationSettings
from .speed_settings import SpeedSettings

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
COMPUTE_DTYPES: tuple[str, ...] = ("auto", "bf16", "fp16", "fp32")
UNITS = ("steps", "epochs")
STREAMING = ("auto", "off", "ram", "disk")
"""Which blocks of the base wait outside the GPU's memory: those that do not fit, none, all in RAM,
all in the quantized copy on disk."""

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}", re.ASCII)
"""The hub's rules for names, and always with an owner."""
PROMPT_LENGTH = 77
"""The recipe's tokens of a caption."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings that change the weights a run produces, apart from its length."""

    learning_rate: float = 1e-4
    """Step size of the optimizer. 1e-4 is the recipe's; small LoRAs bear up to 1e-3."""
    batch_size: int = 1
    """Pictures per micro-step, all of one size. Costs memory in proportion."""
    gradient_accumulation: int = 4
    """Micro-steps per optimizer step. Costs time, not memory."""
    guidance: float = 1.0
    """Guidance value given to a guidance-distilled network; 1.0 preserves the distillation."""
    gradient_checkpointing: bool = True
    """Recompute each block in backward: far less memory for about a third more time."""
    compute_dtype: ComputeDtype = "auto"
    """Type of the arithmetic: auto takes bf16 where the device is fast in it, else fp16 or fp32."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    preservation: PreservationSettings = field(default_factory=PreservationSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    seed: int = 0
    """Seed of the initial LoRA, the order of the pictures, the noise and the timesteps."""

    def __post_init__(self) -> None:
        require(
            self.learning_rate > 0,
            f"The learning rate must be above 0, got {self.learning_rate}. 1e-4 is usual.",
        )
        require(self.batch_size >= 1, f"The batch size must be 1 or more, got {self.batch_size}.")
        require(
            self.gradient_accumulation >= 1,
            f"Gradient accumulation must be at least 1, got {self.gradient_accumulation}.",
        )
        require(self.guidance >= 0, f"The guidance must not be negative, got {self.guidance}.")
        guidance_max = self.flow.guidance_max
        require(
            not guidance_max or guidance_max >= self.guidance,
            f"The guidance is drawn from {self.guidance} up to {guidance_max}, which is less. "
            "Raise guidance_max of Schedule Settings, or lower the guidance of Train LoRA.",
        )
        require(
            self.compute_dtype in COMPUTE_DTYPES,
            f"Unknown compute dtype '{self.compute_dtype}'. "
            f"Choose one of: {', '.join(COMPUTE_DTYPES)}.",
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the pictures of a dataset are trained beside those of others."""

    probability: float = 0.0
    """Its share of the batches, in proportion to the shares of the others; 0 trains every picture
    in every epoch. All datasets of a training have one, or none has."""
    start_step: int = 0
    """The optimizer step from which on they are trained."""

    def __post_init__(self) -> None:
        require(
            0 <= self.probability < math.inf,
            f"The probability of a dataset must be 0 (off) or more, got {self.probability}.",
        )
        require(
            self.start_step >= 0,
            f"The start step of a dataset must be 0 or more, got {self.start_step}.",
        )


ALWAYS = Schedule()


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long to train, in optimizer steps or in passes over the dataset."""

    amount: int = 700
    unit: Literal["steps", "epochs"] = "steps"

    def __post_init__(self) -> None:
        require(
            self.amount >= 1,
            f"The training length must be at least 1, got {self.amount} {self.unit}.",
        )
        require(
            self.unit in UNITS,
            f"The unit of the training length must be steps or epochs, got '{self.unit}'.",
        )

    def num_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps; the last one of the last epoch may see some pictures once more."""
        if self.unit == "steps":
            return self.amount
        # 27 * (7 / 3) is a little more than 63.
        return math.ceil(self.amount * steps_per_epoch - 1e-9)


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """A whole job but for its data and its base model."""

    name: str = "my_lora"
    """Name of the run and of the LoRA file."""
    length: Length = field(default_factory=Length)
    lora: LoraSettings = field(default_factory=LoraSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    checkpoint_every: int = 250
    """Optimizer steps between checkpoints. A checkpoint is also written whenever the run stops."""
    checkpoint_unit: Literal["steps", "epochs"] = "steps"
    """Whether `checkpoint_every` counts steps or epochs."""
    keep_checkpoints: int = 0
    """How many of the last checkpoints are kept, beside the one with the smallest loss on held out
    samples; 0 keeps all, so that a shorter training can be had from a longer one."""
    activations_in_ram: bool = False
    """Keep what backward needs of the forward pass in RAM: with gradient checkpointing the inputs
    of all blocks. Less memory of the GPU for copies both ways; the result is the same."""

    def __post_init__(self) -> None:
        require_file_name(self.name)
        require(
            self.checkpoint_every >= 1,
            f"Checkpoints need a distance of at least 1 step, got {self.checkpoint_every}.",
        )
        require(
            self.checkpoint_unit in UNITS,
            f"Checkpoints are counted in steps or epochs, got '{self.checkpoint_unit}'.",
        )
        require(
            self.keep_checkpoints >= 0,
            f"The number of checkpoints to keep must be 0 (all) or more, got "
            f"{self.keep_checkpoints}.",
        )


def require_file_name(name: str) -> None:
    """Raises ValueError if a name that a user gave cannot be that of a file, or hides it."""
    allowed = all(c.isalnum() or c in "-_. " for c in name)
    bare = name.strip(" ").lstrip(".") == name
    require(
        allowed and bare and 1 <= len(name) <= 60,
        f"The name '{name}' cannot be a file name. "
        "Use up to 60 letters, digits, spaces, '-', '_' and '.'.",
    )


def is_hub_id(name: str) -> bool:
    """Whether it can be the `owner/name` of a repository of the Hugging Face Hub."""
    return _HUB_ID.fullmatch(name) is not None


def to_json(settings: Any) -> dict[str, Any]:
    """A settings dataclass as plain JSON values."""
    return dataclasses.asdict(settings)


def job_from_json(values: dict[str, Any]) -> JobSettings:
    """The inverse of `to_json` for a JobSettings; an unknown field is an error."""
    try:
        return _from_json(JobSettings, _with_optimizer(values))
    except TypeError as error:
        raise ValueError(
            f"The job has a setting that this version does not know: {error}. Remove it from the "
            "job file, or take the version of the pack that wrote it."
        ) from None


def _with_optimizer(values: dict[str, Any]) -> dict[str, Any]:
    """Jobs from before there were settings of the optimizer have the limit of gradients beside
    them."""
    train = dict(values.get("train", {}))
    if "max_grad_norm" not in train:
        return values
    train["optimizer"] = {"clip_limit": train.pop("max_grad_norm")} | train.get("optimizer", {})
    return values | {"train": train}


def _from_json(kind: Any, value: Any) -> Any:
    """The value of a field of this type: JSON has no dataclasses and no tuples."""
    if dataclasses.is_dataclass(kind):
        make: Any = kind
        hints = get_type_hints(kind)
        # A name that is no field is left for the constructor to refuse.
        return make(**{name: _from_json(hints.get(name), of) for name, of in value.items()})
    if isinstance(value, list):
        return tuple(_from_json(get_args(kind)[0], item) for item in value)
    return value
