"""Which optimizer trains, and how its step size goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from .checks import require

OPTIMIZERS = (
    "adamw8bit",
    "adamw8bit_paged",
    "adamw",
    "adamw_bf16",
    "lion8bit",
    "lion8bit_paged",
    "lion",
    "stableadamw",
    "adafactor",
    "came",
    "ademamix8bit",
    "prodigy",
    "prodigy_schedulefree",
    "adamw_schedulefree",
)
LR_SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex")
CLIPPING = ("norm", "value", "none")
OF_BITSANDBYTES = frozenset(
    {"adamw8bit", "adamw8bit_paged", "lion8bit", "lion8bit_paged", "ademamix8bit"}
)
"""Those that its package must run on the device."""
PAGED = {"adamw8bit_paged": "adamw8bit", "lion8bit_paged": "lion8bit"}
"""Those that need CUDA, and what they are without."""
SCHEDULE_FREE = frozenset({"prodigy_schedulefree", "adamw_schedulefree"})
"""They train one set of weights and give another, the average on the way."""
FIND_THEIR_RATE = frozenset({"prodigy", "prodigy_schedulefree"})
_LION = frozenset({"lion", "lion8bit", "lion8bit_paged"})


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The defaults are the recipe's: AdamW8bit at a constant step size."""

    optimizer: str = "adamw8bit"
    """Bytes of its state for each trained value: 2 of adamw8bit, 8 of adamw, 1 of lion8bit. The
    betas are 0.9 and 0.999 of AdamW, and 0.9 and 0.99 of adamw_bf16."""
    weight_decay: float = 1e-4
    """How far a step of size 1 would pull the LoRA towards zero: in each, this times its size. Not
    the magnitudes of a DoRA."""
    schedule: str = "constant"
    """How the step size falls to `min_factor` over the run; all but constant follow its length."""
    warmup_steps: int = 0
    """Steps in which the step size rises from 0, before any schedule."""
    cycles: int = 3
    """cosine_with_restarts: how often it falls."""
    power: float = 2.0
    """polynomial: 1 is linear; more falls faster at first."""
    min_factor: float = 0.0
    """The share of the learning rate that a schedule ends at."""
    lora_plus_ratio: float = 1.0
    """How many times larger the learning rate of a LoRA's B matrices is (LoRA+)."""
    clipping: str = "norm"
    """norm: all gradients are scaled down together. value: each of their values is cut."""
    clip_limit: float = 1.0
    """The largest norm, or value."""
    ema_decay: float = 0.0
    """The share of the average of earlier weights that a step keeps; 0 is off. What is shown and
    saved is then the average."""

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule of the learning rate", self.schedule, LR_SCHEDULES),
            ("clipping", self.clipping, CLIPPING),
        ):
            require(value in known, f"Unknown {kind} '{value}'. Choose one of: {', '.join(known)}.")
        require(
            0 <= self.weight_decay <= 1,
            f"The weight decay must be between 0 and 1, got {self.weight_decay}. 1e-4 to 1e-2 is "
            "usual.",
        )
        require(
            self.warmup_steps >= 0,
            f"The warm-up must have 0 steps (off) or more, got {self.warmup_steps}.",
        )
        require(self.cycles >= 1, f"A schedule needs at least 1 cycle, got {self.cycles}.")
        require(
            0 < self.power <= 100,
            f"The power of a polynomial schedule must be above 0 and at most 100, got "
            f"{self.power}. 1 is linear.",
        )
        require(
            0 <= self.min_factor < 1,
            f"A schedule must end between 0 and 1 of the learning rate, got {self.min_factor}.",
        )
        require(
            1 <= self.lora_plus_ratio <= 1000,
            f"The LoRA+ ratio must be between 1 (off) and 1000, got {self.lora_plus_ratio}. 16 is "
            "usual.",
        )
        require(
            self.clip_limit > 0,
            f"The limit of gradients must be above 0, got {self.clip_limit}. 1.0 is usual for "
            "norms.",
        )
        require(
            0 <= self.ema_decay < 1,
            f"The decay of the average must be 0 (off) or below 1, got {self.ema_decay}. 0.99 is "
            "usual.",
        )
        self._check_together()

    def _check_together(self) -> None:
        name = self.optimizer
        require(
            name not in SCHEDULE_FREE or self.schedule == "constant",
            f"The optimizer {name} has no schedule, got '{self.schedule}': it averages instead. "
            "Set schedule to constant; warmup_steps may stay.",
        )
        require(
            name not in SCHEDULE_FREE or self.ema_decay == 0,
            f"The optimizer {name} gives an average already, so ema_decay must be 0, got "
            f"{self.ema_decay}.",
        )
        require(
            name != "adamw_bf16" or self.ema_decay == 0,
            f"An average needs weights of 32 bits, and adamw_bf16 keeps 16: set ema_decay to 0, "
            f"got {self.ema_decay}, or choose adamw.",
        )
        require(
            name not in FIND_THEIR_RATE or self.lora_plus_ratio == 1,
            f"The optimizer {name} finds one step size for all weights, so lora_plus_ratio must "
            f"be 1, got {self.lora_plus_ratio}.",
        )

    @property
    def needs_length(self) -> bool:
        """Whether a step depends on how many there will be."""
        return self.schedule != "constant"

    def on(self, device_type: str) -> OptimizerSettings:
        """What they are there: paging needs CUDA."""
        name = self.optimizer if device_type == "cuda" else PAGED.get(self.optimizer)
        return self if name in (None, self.optimizer) else replace(self, optimizer=name)

    def check_length(self, num_steps: int) -> None:
        """Raises ValueError if the warm-up or the cycles do not fit into a run of so many steps."""
        require(
            self.warmup_steps < num_steps,
            f"The warm-up of {self.warmup_steps} steps is not shorter than the run, which has "
            f"{num_steps}. Lower warmup_steps of Optimizer Settings, or train longer.",
        )
        rest = num_steps - self.warmup_steps
        # The first step of a cycle has the whole rate: alone it would never fall.
        require(
            self.schedule != "cosine_with_restarts" or 2 * self.cycles <= rest,
            f"A cycle of the schedule needs 2 steps or more, and the {self.cycles} cycles have "
            f"{rest} together. Lower cycles of Optimizer Settings, or train longer.",
        )

    def remarks(self, learning_rate: float, device_type: str) -> Iterator[str]:
        """What a user should hear: of a learning rate that another optimizer would want, and of
        settings that do nothing."""
        name, recipe = self.optimizer, type(self)()
        there = self.on(device_type).optimizer
        if there != name:
            yield (
                f"The optimizer {name} needs CUDA to page its state: here {there} computes, with "
                "the same result."
            )
        if name in FIND_THEIR_RATE and not 0.1 <= learning_rate <= 10:
            yield (
                f"The optimizer {name} finds its step size itself and multiplies it by the "
                f"learning rate, which should be about 1: it is {learning_rate}."
            )
        if name in _LION and learning_rate >= 1e-4:
            yield (
                f"Every step of the optimizer {name} has the full size: a learning rate 3 to 10 "
                f"times smaller than AdamW's is usual, 1e-5 to 3e-5. It is {learning_rate}."
            )
        unused = {
            "cycles": self.schedule != "cosine_with_restarts",
            "power": self.schedule != "polynomial",
            "min_factor": not self.needs_length,
            "clip_limit": self.clipping == "none",
        }
        for setting, is_unused in unused.items():
            if is_unused and getattr(self, setting) != getattr(recipe, setting):
                yield (
                    f"The setting {setting} of Optimizer Settings has no effect with the schedule "
                    f"{self.schedule} and the clipping {self.clipping}."
                )
