"""Every setting of a training job: frozen, keyword-only, checked when made, JSON and back."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
COMPUTE_DTYPES: tuple[str, ...] = ("auto", "bf16", "fp16", "fp32")
UNITS = ("steps", "epochs")
STREAMING = ("auto", "off", "ram", "disk")
"""Which blocks of the base wait outside the GPU's memory: those that do not fit, none, all in RAM,
all in the quantized copy on disk."""

# Suffixes of diffusers' module names, as peft matches them: a name equals the target or ends with
# "." + target. `qlora` is the list of the Hugging Face QLoRA script; `all` and `all+ffs` are
# SimpleTuner's names, here without the model's own final `proj_out`, which `all+ffs` would match.
LORA_TARGETS: dict[str, tuple[str, ...]] = {
    "qlora": ("to_k", "to_q", "to_v", "to_out.0"),
    "all": (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
    ),
    "all+ffs": (
        *("to_k", "to_q", "to_v", "to_out.0"),
        *("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("proj_mlp", "proj_out"),
    ),
}
_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}", re.ASCII)
"""The hub's rules for names, and always with an owner."""
NUM_TIMESTEPS = 1000
TIMESTEP_SAMPLING = (
    "uniform",
    "logit_normal",
    "mode",
    "sigmoid",
    "shift",
    "flux_shift",
    "beta",
    "content",
    "style",
    "balanced",
    "fast",
    "custom",
)
LOSSES = ("mse", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
LOSS_WEIGHTS = ("none", "sigma_sqrt", "cosmap", "bell")
PROMPT_LENGTH = 77
"""The recipe's tokens of a caption."""


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` for a user's mistake."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    rank: int = 4
    """Size of the bottleneck, 1 to 4096. A higher rank learns more and makes a larger file."""
    alpha: float | None = None
    """Strength numerator: the LoRA is scaled by alpha / rank. None means alpha = rank."""
    targets: str = "qlora"
    """Which layers learn: a name of LORA_TARGETS."""

    def __post_init__(self) -> None:
        require(
            1 <= self.rank <= 4096,
            f"The LoRA rank must be between 1 and 4096, got {self.rank}. 4 to 32 is usual.",
        )
        require(
            self.alpha is None or self.alpha > 0,
            f"The LoRA alpha must be above 0, got {self.alpha}. Use the rank if in doubt.",
        )
        require(
            self.targets in LORA_TARGETS,
            f"Unknown LoRA targets '{self.targets}'. Choose one of: {', '.join(LORA_TARGETS)}.",
        )

    @property
    def resolved_alpha(self) -> float:
        """The alpha that goes into the file; the LoRA is scaled by it over the rank."""
        return float(self.alpha or self.rank)


@dataclass(frozen=True, kw_only=True)
class TimestepSettings:
    """How the sigma of each sample is drawn."""

    sampling: str = "uniform"
    """uniform and balanced: all alike. logit_normal, sigmoid, mode, beta: the middle more often.
    shift, flux_shift: sigmoid with one of both shifts. content: much noise more often, which is
    composition; style: little noise. fast: schnell's four steps. custom: a list."""
    shift: float = 0.0
    """Moves all draws: above 1 towards noise, below 1 towards detail; 0 or 1 does nothing."""
    auto_shift: bool = False
    """The shift that FLUX.1-dev samples with: larger for larger pictures, 3.16 at 1024x1024."""
    logit_mean: float = 0.0
    """logit_normal: above 0 more noise. (diffusers' scripts count the other way round.)"""
    logit_std: float = 1.0
    """logit_normal: a smaller value stays nearer to the middle."""
    mode_scale: float = 1.29
    """mode: SD3's s; above 0 the middle, below 0 the ends more often."""
    sigmoid_scale: float = 1.0
    """sigmoid, shift and flux_shift: a larger value goes more often to both ends."""
    beta_alpha: float = 2.0
    """beta: its first parameter; larger than the second one leads to noise."""
    beta_beta: float = 2.0
    custom: tuple[float, ...] = ()
    """custom: sigmas up to 1, or timesteps up to 1000, each as often as it stands here."""

    def __post_init__(self) -> None:
        require(
            self.sampling in TIMESTEP_SAMPLING,
            f"Unknown timestep sampling '{self.sampling}'. Choose one of: "
            f"{', '.join(TIMESTEP_SAMPLING)}.",
        )
        require(
            0 <= self.shift <= 100,
            f"The timestep shift must be between 0 (off) and 100, got {self.shift}. 3 is usual.",
        )
        require(
            not (self.shift and self.auto_shift),
            f"There are two timestep shifts: {self.shift} and the automatic one. Set the first to "
            "0, or turn the second off.",
        )
        require(
            self.sampling != "shift" or self.shift > 0,
            "The timestep sampling 'shift' needs a shift above 0: 3.1582 is FLUX's at 1024x1024.",
        )
        require(
            self.sampling != "flux_shift" or not self.shift,
            "The timestep sampling 'flux_shift' finds its shift by the size of the pictures. Set "
            "the shift to 0, or choose 'shift'.",
        )
        for name in ("logit_std", "sigmoid_scale", "beta_alpha", "beta_beta"):
            value = getattr(self, name)
            require(value > 0, f"The setting {name} of the timesteps must be above 0, got {value}.")
        require(
            -1 <= self.mode_scale <= 1.75,  # outside of it the formula of SD3 is no distribution
            f"The mode scale must be between -1 and 1.75, got {self.mode_scale}.",
        )
        is_custom = self.sampling == "custom"
        require(
            bool(self.custom) or not is_custom,
            "The timestep sampling 'custom' needs a list, such as 1, 0.75, 0.5, 0.25.",
        )
        wrong = [value for value in self.custom if not 0 < value <= NUM_TIMESTEPS]
        require(
            not wrong,
            f"Custom timesteps are sigmas up to 1 or timesteps up to {NUM_TIMESTEPS}, all above 0, "
            f"got {wrong[:1]}.",
        )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """How errors are counted."""

    loss: str = "mse"
    """mse: squares. huber, smooth_l1: squares of small errors and sizes of large ones, so that a
    bad picture counts less; huber falls with huber_c, smooth_l1 does not."""
    huber_c: float = 0.1
    """Where huber and smooth_l1 turn from squares to sizes."""
    huber_schedule: str = "constant"
    """How that moves with the noise: exponential and snr begin at 1 without noise."""
    weight: str = "none"
    """How much each sigma counts. sigma_sqrt: detail far more. cosmap: the middle a little more.
    bell: the middle most, both ends hardly."""

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("loss", self.loss, LOSSES),
            ("Huber schedule", self.huber_schedule, HUBER_SCHEDULES),
            ("loss weight", self.weight, LOSS_WEIGHTS),
        ):
            require(value in known, f"Unknown {kind} '{value}'. Choose one of: {', '.join(known)}.")
        require(
            0 < self.huber_c <= 1, f"The setting huber_c must be in 0 to 1, got {self.huber_c}."
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings that change the weights a run produces, apart from its length."""

    learning_rate: float = 1e-4
    """Step size of AdamW8bit. 1e-4 is the recipe's; small LoRAs bear up to 1e-3."""
    batch_size: int = 1
    """Pictures per micro-step, all of one size. Costs memory in proportion."""
    gradient_accumulation: int = 4
    """Micro-steps per optimizer step. Costs time, not memory."""
    guidance: float = 1.0
    """Guidance value given to a guidance-distilled network; 1.0 preserves the distillation."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this one."""
    gradient_checkpointing: bool = True
    """Recompute each block in backward: far less memory for about a third more time."""
    compute_dtype: ComputeDtype = "auto"
    """Type of the arithmetic: auto takes bf16 where the device is fast in it, else fp16 or fp32."""
    timesteps: TimestepSettings = TimestepSettings()
    loss: LossSettings = LossSettings()
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
        require(
            self.max_grad_norm > 0,
            f"The largest gradient norm must be above 0, got {self.max_grad_norm}. 1.0 is usual.",
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
        return JobSettings(
            **{
                **values,
                "length": Length(**values.get("length", {})),
                "lora": LoraSettings(**values.get("lora", {})),
                "train": _train_from_json(values.get("train", {})),
            }
        )
    except TypeError as error:
        raise ValueError(
            f"The job has a setting that this version does not know: {error}. Remove it from the "
            "job file, or take the version of the pack that wrote it."
        ) from None


def _train_from_json(values: dict[str, Any]) -> TrainSettings:
    timesteps, loss = values.get("timesteps", {}), values.get("loss", {})
    custom = tuple(timesteps.get("custom", ()))  # JSON has no tuples
    return TrainSettings(
        **{
            **values,
            "timesteps": TimestepSettings(**{**timesteps, "custom": custom}),
            "loss": LossSettings(**loss),
        }
    )
