"""The optimizer, and its state as safetensors and JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .packages import importing


def make_adamw8bit(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit as the Hugging Face QLoRA script sets it up.

    Raises:
        ValueError: if bitsandbytes cannot be imported.
    """
    with importing("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as tensors and JSON values, both named `<parameter>/<key>`.

    bitsandbytes nests its quantization tables one dictionary deeper: `<parameter>/<key>/<key>`.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in _leaves(optimizer.state_dict()["state"]):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone()
        else:
            values[name] = value
    return tensors, values


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """The inverse of `optimizer_tensors` for an optimizer over the same parameters."""
    state: dict[Any, Any] = {}
    for name, value in {**tensors, **values}.items():
        index, *path, last = name.split("/")
        leaf = state.setdefault(int(index), {})
        for key in path:
            leaf = leaf.setdefault(key, {})
        leaf[last] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
