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
LOSSES = ("mse", "huber", "smooth_l1")
HUBER_SCHEDULES = ("constant", "exponential", "snr")
LOSS_WEIGHTS = ("none", "sigma_sqrt", "cosmap", "bell")


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
class FlowSettings:
    """The draws of a micro-step, and the loss."""

    timesteps: TimestepSettings = TimestepSettings()
    loss: LossSettings = LossSettings()
