"""The state of any optimizer as safetensors and JSON, and back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' state_dict puts what FSDP may not gather."""
_BUFFERS = ("state1", "state2")
_FIXED = frozenset({"params", "lr", "initial_lr"})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer as tensors and JSON values, both named `<parameter>/<key>`.

    bitsandbytes nests its quantization tables one dictionary deeper: `<parameter>/<key>/<key>`.
    What a group of parameters has beyond its settings is named `group/<index>/<key>`.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    groups = {index: _changed(optimizer, g) for index, g in enumerate(optimizer.param_groups)}
    for name, value in _leaves({**optimizer.state_dict()["state"], "group": groups}):
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().clone()
        else:
            values[name] = value
    return tensors, values


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """The inverse of `optimizer_tensors` for a new optimizer over the same parameters.

    Not by its `load_state_dict`: torch's casts every tensor to the type of its parameter, and
    rounding errors of a state in bf16 would end.
    """
    tree: dict[str, Any] = {}
    for name, value in {**tensors, **values}.items():
        *path, last = name.split("/")
        leaf = tree
        for key in path:
            leaf = leaf.setdefault(key, {})
        leaf[last] = value
    groups = tree.pop("group", {})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in tree.items():
        parameter = parameters[int(index)]
        state |= state.pop(_WRAPPED, {})
        optimizer.state[parameter] = {
            key: _placed(optimizer, parameter, key, value) for key, value in state.items()
        }
    for index, group in groups.items():
        (device, *_) = (p.device for p in optimizer.param_groups[int(index)]["params"])
        for key, value in group.items():
            optimizer.param_groups[int(index)][key] = _on_device(key, value, device)


def _changed(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """What a group has that it was not made with, such as Prodigy's step size."""
    return {
        key: value
        for key, value in group.items()
        if key not in _FIXED
        and (isinstance(value, Tensor) or value != optimizer.defaults.get(key, _FIXED))
    }


def _placed(optimizer: torch.optim.Optimizer, parameter: Tensor, key: str, value: Any) -> Any:
    """A value of a parameter's state where the optimizer wants it."""
    if getattr(optimizer, "is_paged", False) and key in _BUFFERS:
        # In memory that the driver moves: bitsandbytes fills it on the device, we on the CPU.
        buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # pyright: ignore
        if parameter.is_cuda:
            torch.cuda.synchronize(parameter.device)
        return buffer.copy_(value)
    return _on_device(key, value, parameter.device)


def _on_device(key: str, value: Any, device: torch.device) -> Any:
    """torch keeps the counter `step` on the CPU, and so do others."""
    return value.to(device) if isinstance(value, Tensor) and key != "step" else value


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
