"""The learning rate of every step, against diffusers' and transformers' schedulers and the
package's REX."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from atelier.trainers.learning_rates import rate_factor
from atelier.trainers.optimizer_settings import OptimizerSettings
from diffusers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)
from pytorch_optimizer.lr_scheduler import REXScheduler
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_with_min_lr_schedule_with_warmup

RATE, STEPS = 3e-4, 40


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], num_steps: int) -> list[float]:
    """What a scheduler gives for each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler, found = make(optimizer), []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


SCHEDULES = {
    "constant": lambda o, w: get_constant_schedule_with_warmup(o, w),
    "linear": lambda o, w: get_linear_schedule_with_warmup(o, w, STEPS),
    "cosine": lambda o, w: get_cosine_with_min_lr_schedule_with_warmup(o, w, STEPS, min_lr=0.0),
    "cosine_with_restarts": lambda o, w: get_cosine_with_hard_restarts_schedule_with_warmup(
        o, w, STEPS, num_cycles=3
    ),
    "polynomial": lambda o, w: get_polynomial_decay_schedule_with_warmup(
        o, w, STEPS, lr_end=0.0, power=2.0
    ),
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_those_of_the_known_schedulers(schedule: str, warmup: int) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup_steps=warmup)
    ours = [RATE * rate_factor(settings, step, STEPS) for step in range(STEPS)]
    theirs = rates(lambda optimizer: SCHEDULES[schedule](optimizer, warmup), STEPS)
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_rex_is_that_of_its_package() -> None:
    settings = OptimizerSettings(schedule="rex", min_factor=0.1)
    ours = [RATE * rate_factor(settings, step, STEPS) for step in range(STEPS)]

    def make(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return REXScheduler(optimizer, STEPS, max_lr=RATE, min_lr=0.1 * RATE)

    # It takes its first step when it is made, and begins at its lowest rate.
    assert ours == pytest.approx([RATE, *rates(make, STEPS)[1:]], rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "polynomial"])
def test_a_schedule_ends_at_the_lowest_factor(schedule: str) -> None:
    settings = OptimizerSettings(schedule=schedule, warmup_steps=4, min_factor=0.25, power=1.5)
    ours = [RATE * rate_factor(settings, step, STEPS) for step in range(STEPS)]
    make = {
        "cosine": lambda o: get_cosine_with_min_lr_schedule_with_warmup(
            o, 4, STEPS, min_lr_rate=0.25
        ),
        "polynomial": lambda o: get_polynomial_decay_schedule_with_warmup(
            o, 4, STEPS, lr_end=0.25 * RATE, power=1.5
        ),
    }[schedule]
    assert ours == pytest.approx(rates(make, STEPS), rel=1e-9)
    assert rate_factor(settings, STEPS, STEPS) == 0.25


def test_a_constant_rate_is_the_very_number() -> None:
    """The recipe's runs must stay what they are."""
    assert {rate_factor(OptimizerSettings(), step, 0) for step in range(3)} == {1.0}


def test_a_warm_up_must_end_before_the_run() -> None:
    settings = OptimizerSettings(warmup_steps=100)
    settings.check_length(101)
    with pytest.raises(ValueError, match=r"^The warm-up of 100 steps is not shorter .* has 100\."):
        settings.check_length(100)
