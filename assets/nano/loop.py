"""One training loop for every stage: AdamW, a falling rate, an average, resumable checkpoints."""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

logger = logging.getLogger("nano")


@dataclass(frozen=True)
class Recipe:
    """Length and rates of one stage."""

    steps: int
    learning_rate: float = 1e-3
    warmup: int = 100
    ema: float = 0.0
    """Decay of the moving average that becomes the result; 0 keeps the last weights."""
    weight_decay: float = 0.01
    save_every: int = 250
    seed: int = 0


def save(value: object, path: Path) -> None:
    """Writes beside the target and renames, so that a reader never sees half a file."""
    torch.save(value, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def rate(step: int, recipe: Recipe) -> float:
    """Share of the peak rate: warm-up, level, half a cosine down to 2 % over the last third.

    Level for so long that a run can be given more steps, or fewer, after it has begun.
    """
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = max(0.0, 3 * step / recipe.steps - 2)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


class Average:
    """Exponential moving average of a module's parameters, quick to forget at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.live = decay, list(module.parameters())
        self.names = [name for name, _ in module.named_parameters()]
        self.values = [p.detach().clone() for p in self.live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, self.live, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.values, strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            value.copy_(state[name])


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int, torch.Generator], Tensor],
    recipe: Recipe,
    work: Path,
) -> nn.Module:
    """Trains `module` in place and returns it with the averaged weights loaded.

    `loss_at(step, generator)` gives the loss of one batch; everything random in it must come from
    the generator, which depends on the step alone, so that a resumed run sees the same batches.
    """
    path = work / f"{name}.checkpoint.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, recipe.learning_rate, (0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    average, first = Average(module, recipe.ema), 0
    if path.exists():
        state = torch.load(path, map_location=next(module.parameters()).device)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        first = state["step"]
        logger.info("%s resumes at step %d", name, first)
    running, since = None, time.monotonic()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate(step, recipe)
        loss = loss_at(step, torch.Generator().manual_seed(recipe.seed * 1_000_003 + step))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            seconds, since = (time.monotonic() - since) / 50, time.monotonic()
            logger.info(
                "%s step %d of %d, loss %.4f, %.2f s/step",
                name,
                step + 1,
                recipe.steps,
                running,
                seconds,
            )
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            parts = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state(),
            }
            save({**parts, "step": step + 1, "loss": running}, path)
    if recipe.ema:
        module.load_state_dict(average.state(), strict=False)
    return module
