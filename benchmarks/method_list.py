"""What benchmarks/methods.py trains: the demo's style LoRA, and it again with one thing changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.formats import FORMATS
from atelier.trainers.lora_settings import LoraSettings

NUM_STEPS = 100
LEARNING_RATE = 5e-4
DEFAULT = JobSettings(
    name="methods",
    length=Length(amount=NUM_STEPS),
    lora=LoraSettings(rank=16, targets="all+ffs"),
    train=TrainSettings(
        learning_rate=LEARNING_RATE,
        batch_size=4,
        gradient_accumulation=1,
        compute_dtype="fp32",
        gradient_checkpointing=False,
    ),
    checkpoint_every=10_000,
)
"""The quickstart's settings, in fewer steps."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    group: str
    name: str
    lora: dict[str, Any] = field(default_factory=dict)
    """Changed fields of LoraSettings; those below it of TrainSettings, and of the settings in its
    fields of these names."""
    train: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    format: str = "nf4"
    """Of the base model."""
    note: str = ""
    """What the table says of it besides."""

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def job(self) -> JobSettings:
        """Raises TypeError or ValueError for settings that are not there or not allowed."""
        train = DEFAULT.train
        flow = dataclasses.replace(
            train.flow,
            timesteps=dataclasses.replace(train.flow.timesteps, **self.timesteps),
            loss=dataclasses.replace(train.flow.loss, **self.loss),
        )
        optimizer = dataclasses.replace(train.optimizer, **self.optimizer)
        train = dataclasses.replace(train, flow=flow, optimizer=optimizer, **self.train)
        lora = dataclasses.replace(DEFAULT.lora, **self.lora)
        return dataclasses.replace(DEFAULT, lora=lora, train=train)


def rows() -> list[Method]:
    """All rows, the default first."""
    return [
        Method(group="Default", name="the default"),
        *(Method(group="Default", name=f"seed {seed}", train={"seed": seed}) for seed in (1, 2)),
        *(
            Method(group="LoRA targets", name=name, lora={"targets": name})
            for name in ("qlora", "all")
        ),
        *(Method(group="Rank", name=f"{rank}", lora={"rank": rank}) for rank in (4, 64)),
        *(
            Method(group="Format of the base", name=format, format=format)
            for format in FORMATS
            if format != DEFAULT_FORMAT
        ),
        *(
            Method(group="Timesteps", name=name, timesteps={"sampling": name})
            for name in (
                "logit_normal",
                "mode",
                "sigmoid",
                "beta",
                "content",
                "style",
                "flux_shift",
            )
        ),
        Method(group="Timesteps", name="shift of 3", timesteps={"shift": 3.0}),
        *(Method(group="Loss", name=name, loss={"loss": name}) for name in ("huber", "smooth_l1")),
        *(
            Method(group="Loss", name=f"weight {name}", loss={"weight": name})
            for name in ("sigma_sqrt", "cosmap", "bell")
        ),
    ]


DEFAULT_FORMAT = Method(group="", name="").format
