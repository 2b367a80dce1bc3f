"""Changes of single tensors of a network, made while it is read: how LoRAs are fused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Tensors(Protocol):
    """The tensors of a FLUX by their original names, each read when it is asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, device: torch.device) -> Tensor:
        """A fresh tensor on `device`, of any floating type."""
        ...

    def packed_format(self, name: str) -> str | None:
        """The format of the store in which a matrix already lies, if it does."""
        ...

    def read_packed(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Its bytes and scales in that format, on the CPU."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What is done to some tensors of a network."""

    names: frozenset[str]
    apply: Callable[[str, Tensor], Tensor]
    """Name and float32 tensor -> the changed one, of the same shape. It may write to the one it is
    given."""
    fingerprint: str
    """The same for the same change."""


class ChangedTensors:
    """`tensors` with changes, the first one first; what none of them names stays as it is."""

    def __init__(self, tensors: Tensors, changes: Sequence[Change]) -> None:
        self.shapes = tensors.shapes
        self._tensors, self._changes = tensors, changes

    def read(self, name: str, device: torch.device) -> Tensor:
        """In float32 if it is changed.

        Raises:
            ValueError: if a change leads to numbers that are not finite.
        """
        tensor = self._tensors.read(name, device)
        for change in self._changes:
            if name in change.names:
                tensor = change.apply(name, tensor.to(torch.float32))
        if self._is_changed(name) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"With its LoRAs, '{name}' of this MODEL has values that are not finite. Take off "
                "the LoRA that is damaged, or lower its strength."
            )
        return tensor

    def packed_format(self, name: str) -> str | None:
        return None if self._is_changed(name) else self._tensors.packed_format(name)

    def read_packed(self, name: str) -> tuple[Tensor, Tensor | None]:
        return self._tensors.read_packed(name)

    def _is_changed(self, name: str) -> bool:
        return any(name in change.names for change in self._changes)
