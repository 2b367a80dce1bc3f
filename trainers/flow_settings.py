"""What a training sees of the way from pictures to noise, and how errors on it are counted."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require

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
PARAMETERS = {
    "logit_normal": ("logit_mean", "logit_std"),
    "mode": ("mode_scale",),
    "sigmoid": ("sigmoid_scale",),
    "shift": ("sigmoid_scale",),
    "flux_shift": ("sigmoid_scale",),
    "beta": ("beta_alpha", "beta_beta"),
}
"""The settings that only some samplings read."""
LOSSES = ("mse", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
LOSS_WEIGHTS = ("none", "sigma_sqrt", "cosmap", "bell")
ROLLOUT_OFFSETS = ("uniform", "early", "late")
RAMPS = ("linear", "cosine")


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
        require(
            -10 <= self.logit_mean <= 10,
            f"The setting logit_mean of the timesteps must be between -10 and 10, got "
            f"{self.logit_mean}. -1 to 1 is usual.",
        )
        for name in ("logit_std", "sigmoid_scale", "beta_alpha", "beta_beta"):
            value = getattr(self, name)
            require(
                0 < value <= 100,
                f"The setting {name} of the timesteps must be above 0 and at most 100, got "
                f"{value}.",
            )
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
class RolloutSettings:
    """Scheduled sampling: some samples train where the network's own steps lead, so that it learns
    to correct its own errors. The names and values of SimpleTuner."""

    max_offset: int = 0
    """How many timesteps of 1000 before the trained one these steps begin, at most; 0 is off. Each
    of them is a forward pass without gradient."""
    offsets: str = "uniform"
    """How many there are of at most: all numbers alike, early (fewer) or late (more)."""
    probability: float = 0.5
    """Share of the samples that begin there, after the ramp."""
    start_probability: float = 0.0
    """This share at the first step of the ramp."""
    ramp_steps: int = 0
    """Optimizer steps in which the share goes from the one to the other; 0 is at once."""
    ramp: str = "linear"

    def __post_init__(self) -> None:
        require(
            0 <= self.max_offset <= 100,
            f"A rollout has 0 (off) to 100 timesteps, got {self.max_offset}. 5 to 10 are usual.",
        )
        for kind, value, known in (
            ("kind of rollout offsets", self.offsets, ROLLOUT_OFFSETS),
            ("rollout ramp", self.ramp, RAMPS),
        ):
            require(value in known, f"Unknown {kind} '{value}'. Choose one of: {', '.join(known)}.")
        for share in (self.probability, self.start_probability):
            require(
                0 <= share <= 1,
                f"The share of samples with a rollout must be between 0 and 1, got {share}.",
            )
        require(
            self.ramp_steps >= 0,
            f"The rollout's ramp must be 0 (none) or more steps long, got {self.ramp_steps}.",
        )


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """The draws of a micro-step, and the loss."""

    timesteps: TimestepSettings = TimestepSettings()
    loss: LossSettings = LossSettings()
    noise_offset: float = 0.0
    """A constant is added to the noise of each channel, drawn with this deviation: brighter and
    darker pictures than the average are learned more easily."""
    guidance_max: float = 0.0
    """Each sample is given a guidance drawn evenly from `guidance` to this one; 0 is off."""
    bypass_guidance: bool = False
    """Train as if the network had no guidance embedding: it is told time and text only."""
    rollout: RolloutSettings = RolloutSettings()

    def __post_init__(self) -> None:
        require(
            0 <= self.noise_offset <= 1,
            f"The noise offset must be between 0 (off) and 1, got {self.noise_offset}. 0.05 is "
            "usual.",
        )
        require(
            0 <= self.guidance_max <= 100,
            f"The largest guidance must be between 0 (off) and 100, got {self.guidance_max}.",
        )
        require(
            not (self.bypass_guidance and self.guidance_max),
            f"The guidance is bypassed and drawn up to {self.guidance_max} at once. Turn "
            "bypass_guidance off, or set guidance_max to 0.",
        )


def parse_sigmas(text: str) -> tuple[float, ...]:
    """The numbers of a list such as "1, 0.75, 0.5".

    Raises:
        ValueError: a part of it is no number.
    """
    parts = text.replace(",", " ").split()
    try:
        return tuple(float(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"Custom timesteps are numbers with commas, such as 1, 0.75, 0.5, got '{text}'."
        ) from None
