"""A training that has not started: what it needs on the device and in system memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .flux import FluxConfig
from .load import BaseFlux, LoadedFlux
from .memory import (
    MemoryEstimate,
    Workload,
    estimate_training,
    most_kept_blocks,
    pinned_bytes,
    placed_bytes,
    store_bytes,
    streamed_bytes,
)


@dataclass(frozen=True, kw_only=True)
class RamEstimate:
    """Bytes of system memory while a training runs on a device with memory of its own.

    What waits for the device is page-locked with CUDA: no swap file takes it.
    """

    weights: int
    """Blocks that are streamed, or with "disk" the two on their way."""
    activations: int
    """What leaves the device until backward."""
    checkpoint: int
    """The LoRA and the optimizer's state while they are saved."""
    batch: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.checkpoint + self.batch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training that has not started, and where it would run."""

    config: FluxConfig
    format: str
    weights: int
    """Bytes that the weights take when none is streamed."""
    workload: Workload
    device: torch.device
    streaming: str
    """A value of config.STREAMING."""
    other_copy: int = 0
    """Bytes of the same weights that the host keeps for itself, in system memory."""
    is_from_core: bool = False
    """Whether a loader of the host gave the model: it has none of our loader's settings."""
    in_ram: int | None = None
    """Bytes of the weights that lie in system memory now; None if the model is not loaded."""

    @classmethod
    def of(cls, base: BaseFlux, workload: Workload, device: torch.device) -> Plan:
        """The training of `workload` on a model that is loaded."""
        return cls(
            config=base.config,
            format=base.format,
            weights=base.store.num_bytes,
            workload=workload,
            device=device,
            streaming=base.store.streaming,
            is_from_core=not isinstance(base, LoadedFlux),
            in_ram=base.store.bytes_in_ram,
        )

    @property
    def needed(self) -> MemoryEstimate:
        """With all weights on the device. On a CPU nothing can leave it for system memory."""
        keeps = self.workload.activations_in_ram and self.device.type == "cpu"
        workload = self._workload(activations_in_ram=False) if keeps else self.workload
        estimate = estimate_training(self.config, self.format, workload)
        return replace(estimate, weights=self.weights)

    @property
    def least_bytes(self) -> int:
        """What is needed on the device with every block streamed, if blocks can be."""
        if not self.can_stream:
            return self.needed.total
        return streamed_bytes(self.config, self.format) + self.needed.beside_weights

    @property
    def can_stream(self) -> bool:
        if self.device.type == "cpu":  # blocks in its RAM are on it
            return self.streaming == "disk"
        return self.streaming != "off"

    @property
    def has_own_memory(self) -> bool:
        """Whether the device's memory is another than the system's."""
        return self.device.type not in ("cpu", "mps")

    def ram(self, free_bytes: int) -> RamEstimate:
        """System memory while it runs, with `free_bytes` on the device."""
        needed = self.needed
        return RamEstimate(
            weights=self._weights_in_ram(free_bytes - needed.beside_weights),
            activations=needed.saved,
            checkpoint=needed.checkpoint,
            batch=needed.batch,
        )

    def ram_needed(self, free_bytes: int) -> int:
        """The most of system memory that it needs at once: a model that is not loaded yet lies
        there before it goes to the device. (One that is streamed from disk only if its quantized
        copy has to be made.)"""
        comes_through = self.in_ram is None and self.streaming != "disk"
        return max(self.ram(free_bytes).total, self.weights if comes_through else 0)

    def _weights_in_ram(self, budget: int) -> int:
        if self.streaming == "off" or (self.streaming == "auto" and self.weights <= budget):
            return 0
        if self.streaming == "auto":
            return placed_bytes(self.config, self.format, budget)[1]
        on_device, streamed = placed_bytes(self.config, self.format, 0)
        if self.streaming == "ram":
            return streamed
        slots = on_device - (self.weights - streamed)
        return 2 * pinned_bytes(slots // 2)

    def most_kept_blocks(self, room: int) -> int:
        """How many blocks selective checkpointing keeps with `room` bytes beside the weights."""
        return most_kept_blocks(self.config, self.format, self.workload, room)

    def with_workload(self, **changes: Any) -> Plan:
        return replace(self, workload=self._workload(**changes))

    def with_format(self, format: str) -> Plan:
        weights = store_bytes(self.config, format)
        return replace(self, format=format, weights=weights, in_ram=None)

    def with_streaming(self, streaming: str) -> Plan:
        return replace(self, streaming=streaming, in_ram=None)

    def _workload(self, **changes: Any) -> Workload:
        return replace(self.workload, **changes)
