"""Short trainings of the tiny FLUX, and what stops them."""

from __future__ import annotations

from typing import Any

import torch
from atelier.trainers.config import JobSettings, Length, TrainSettings
from atelier.trainers.hooks import Hooks, Trained
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.run import Checkpoint

LORA = LoraSettings(rank=16)  # large enough for an optimizer state of 8 bits


def job(
    num_steps: int = 5, *, checkpoint_every: int = 250, keep_checkpoints: int = 0, **settings: Any
) -> JobSettings:
    values = {"learning_rate": 1e-2, "compute_dtype": "fp32", "gradient_checkpointing": False}
    values |= {"gradient_accumulation": 1, **settings}
    return JobSettings(
        name="test",
        length=Length(amount=num_steps),
        lora=LORA,
        train=TrainSettings(**values),  # pyright: ignore[reportArgumentType]
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
    )


class Stop(BaseException):
    """What a host raises for Cancel; not an Exception."""


def stop_before(micro_step: int) -> Hooks:
    calls = iter(range(1000))

    def check() -> None:
        if next(calls) == micro_step:
            raise Stop

    return Hooks(check_stop=check)


def assert_same_checkpoint(one: Checkpoint, other: Checkpoint) -> None:
    assert one.values == other.values
    for mine, theirs in ((one.adapter, other.adapter), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def assert_same_lora(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    assert one.lora.keys() == other.lora.keys()
    assert all(torch.equal(one.lora[name], other.lora[name]) for name in one.lora)
