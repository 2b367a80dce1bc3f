"""What the state of an optimizer takes: the optimizer itself takes a step, and is measured."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .optimizer_settings import PAGED, OptimizerSettings
from .optimizers import cast_parameters, make_optimizer, own_draws

_SMALLEST_PAGED = 100_000
"""bitsandbytes pages the state of parameters with so many values or more."""


class OptimizerBytes(NamedTuple):
    device: int
    paged: int
    """What may be in system memory instead."""


def optimizer_bytes(
    settings: OptimizerSettings, parameters: Mapping[str, Tensor]
) -> OptimizerBytes:
    """Of the parameters of a LoRA, by their names; only their shapes are looked at.

    Raises:
        ValueError: if the package of the optimizer cannot be imported.
    """
    on_device, paged = 0, 0
    for name, parameter in parameters.items():
        # Prodigy remembers where a parameter began, unless that was 0.
        begins_at_0 = ".lora_B." in name
        taken = _state_bytes(settings.optimizer, tuple(parameter.shape), begins_at_0)
        if settings.optimizer in PAGED and parameter.numel() >= _SMALLEST_PAGED:
            paged += taken
        else:
            on_device += taken
    return OptimizerBytes(on_device, paged)


@functools.lru_cache(maxsize=1024)
def _state_bytes(name: str, shape: tuple[int, ...], begins_at_0: bool) -> int:
    settings = OptimizerSettings(optimizer=name, weight_decay=0)
    # A host may ask from inside its inference mode.
    with torch.inference_mode(False):
        parameter = nn.Parameter(torch.zeros(shape) if begins_at_0 else torch.ones(shape))
        cast_parameters(settings, [parameter])
        optimizer = make_optimizer(settings, {"parameter": parameter}, 1e-4)
        parameter.grad = torch.ones_like(parameter)
        with own_draws(0, 0, parameter.device):
            optimizer.step()
    # bitsandbytes' tables for 8 bits are shared by all parameters.
    return sum(
        value.nbytes
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and "qmap" not in key
    )
