"""What benchmarks/methods.py trains: the demo's style LoRA, and it again with one thing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.formats import FORMATS
from atelier.trainers.lora_settings import LoraSettings

DEFAULT = JobSettings(
    name="methods",
    length=Length(amount=80),
    lora=LoraSettings(rank=16, targets="all+ffs"),
    train=TrainSettings(
        learning_rate=5e-4,
        batch_size=4,
        gradient_accumulation=1,
        compute_dtype="fp32",
        gradient_checkpointing=False,
    ),
    checkpoint_every=10_000,
)
"""The quickstart's settings, in fewer steps."""
FORMAT = "nf4"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the table."""

    group: str
    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of JobSettings with other values; of a field that holds settings, its changes."""
    format: str = FORMAT
    """Of the base model."""
    note: str = ""
    """What the table says of it besides."""

    @property
    def key(self) -> str:
        return f"{self.group}: {self.name}"

    @property
    def job(self) -> JobSettings:
        """Raises TypeError or ValueError for settings that are not there or not allowed."""
        return changed(DEFAULT, self.changes)


def changed(settings: Any, changes: dict[str, Any]) -> Any:
    values = {
        name: changed(getattr(settings, name), value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    return dataclasses.replace(settings, **values)


def rows() -> list[Method]:
    """All rows, the default first."""
    return [
        Method(group="Default", name="the default"),
        *(
            Method(group="Default", name=f"seed {n}", changes={"train": {"seed": n}})
            for n in (1, 2)
        ),
        *_lora(),
        *_optimizers(),
        *_learning_rates(),
        *_flow(),
        *_speed(),
        *(Method(group="Format of the base", name=f, format=f) for f in FORMATS if f != FORMAT),
    ]


def _lora() -> Iterator[Method]:
    yield from _each("Rank", "lora", {str(rank): {"rank": rank} for rank in (4, 64)})
    targets = ("qlora", "all", "context", "context+ffs", "fal", "ai-toolkit")
    yield from _each("LoRA targets", "lora", {name: {"targets": name} for name in targets})
    kinds = {
        "LoHa": {"kind": "loha"},
        "LoKr": {"kind": "lokr"},
        "LoKr, factor 8, full matrix": {"kind": "lokr", "lokr_factor": 8, "full_matrix": True},
        "DoRA": {"dora": True},
        "rsLoRA": {"rslora": True},
        "dropout 0.1": {"dropout": 0.1},
    }
    yield from _each("Kind of LoRA", "lora", kinds)
    lokr = {"lora": kinds["LoKr"], "train": {"learning_rate": 5e-3}}
    yield Method(group="Kind of LoRA", name="LoKr, ten times the rate", changes=lokr)
    inits = ("default", "pissa", "olora", "loftq")
    yield from _each("Start of the LoRA", "lora", {name: {"init": name} for name in inits})


def _optimizers() -> Iterator[Method]:
    """Each at a learning rate that is usual for it beside AdamW's."""
    rates = {
        "adamw": None,
        "adamw_bf16": None,
        "adamw8bit_paged": None,
        "stableadamw": None,
        "ademamix8bit": None,
        "adamw_schedulefree": None,
        "lion": 1e-4,
        "lion8bit": 1e-4,
        "lion8bit_paged": 1e-4,
        "adafactor": None,
        "came": 2e-4,
        "prodigy": 1.0,
        "prodigy_schedulefree": 1.0,
    }
    for name, rate in rates.items():
        train: dict[str, Any] = {"optimizer": {"optimizer": name}}
        if rate:
            train["learning_rate"] = rate
        yield Method(group="Optimizer", name=name, changes={"train": train})
    lion: dict[str, Any] = {"optimizer": {"optimizer": "lion8bit"}}
    yield Method(group="Optimizer", name="lion8bit, the default's rate", changes={"train": lion})


def _learning_rates() -> Iterator[Method]:
    for rate in (1e-4, 2e-3):
        name = f"constant {rate:g}"
        yield Method(group="Learning rate", name=name, changes={"train": {"learning_rate": rate}})
    options = {
        "linear": {"schedule": "linear"},
        "cosine": {"schedule": "cosine"},
        "cosine with 3 restarts": {"schedule": "cosine_with_restarts"},
        "polynomial": {"schedule": "polynomial"},
        "REX": {"schedule": "rex"},
        "20 steps of warm-up": {"warmup_steps": 20},
        "LoRA+ 16": {"lora_plus_ratio": 16.0},
        "clipping by value 0.01": {"clipping": "value", "clip_limit": 0.01},
        "no clipping": {"clipping": "none"},
        "EMA 0.95": {"ema_decay": 0.95},
    }
    yield from _each("Learning rate", "train", {n: {"optimizer": o} for n, o in options.items()})


def _flow() -> Iterator[Method]:
    samplings = ("logit_normal", "mode", "sigmoid", "beta", "content", "style", "flux_shift")
    timesteps = {name: {"sampling": name} for name in samplings}
    timesteps |= {"shift of 3": {"shift": 3.0}, "automatic shift": {"auto_shift": True}}
    yield from _flow_rows("Timesteps", "timesteps", timesteps)
    losses = {name: {"loss": name} for name in ("huber", "smooth_l1")}
    losses |= {f"weight {name}": {"weight": name} for name in ("sigma_sqrt", "cosmap", "bell")}
    yield from _flow_rows("Loss", "loss", losses)
    others: dict[str, Any] = {
        "noise offset 0.05": {"noise_offset": 0.05},
        "guidance from 1 to 4": {"guidance_max": 4.0},
        "without guidance": {"bypass_guidance": True},
        "rollout of up to 5": {"rollout": {"max_offset": 5}},
    }
    yield from _each("Noise and guidance", "train", {n: {"flow": o} for n, o in others.items()})


def _speed() -> Iterator[Method]:
    options: dict[str, Any] = {
        "TREAD 0.5 from block 2 to -2": {"tread": _route(0.5)},
        "TREAD 0.25 from block 2 to -2": {"tread": _route(0.25)},
    }
    yield from _each("Speed", "train", {n: {"speed": o} for n, o in options.items()})
    recomputed = {"gradient_checkpointing": True}
    yield from _each("Speed", "train", {"gradient checkpointing": recomputed})


def _route(ratio: float) -> Any:
    from atelier.trainers.speed_settings import TreadRoute

    return (TreadRoute(selection_ratio=ratio, start_layer=2, end_layer=-2),)


def _flow_rows(group: str, part: str, options: dict[str, Any]) -> Iterable[Method]:
    nested = {name: {"flow": {part: option}} for name, option in options.items()}
    return _each(group, "train", nested)


def _each(group: str, part: str, options: dict[str, Any]) -> Iterable[Method]:
    """A row for each option, the changes of the settings `part` by the name of the row."""
    return (Method(group=group, name=n, changes={part: o}) for n, o in options.items())
