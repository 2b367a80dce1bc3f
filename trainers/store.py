"""The packed weights of one network: a single copy that every face of it computes with.

`WeightStore` maps the names of the original FLUX file to matrices in their formats. It alone moves
bytes between devices, and says which blocks stay on one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .devices import require_format_on
from .offload import (
    HOST,
    BlockStream,
    DiskBlock,
    DiskFeed,
    HostBlock,
    Layout,
    RamFeed,
    Streamed,
    blocks_of,
    resident_blocks,
    slot_bytes,
)
from .packed_weight import Matrix, PackedWeight

logger = logging.getLogger("atelier")


class Weights(Protocol):
    """The tensors of one network by their original names, as the training network asks for them."""

    @property
    def packed(self) -> Mapping[str, Matrix]:
        """Every `….weight` of a Linear."""
        ...

    @property
    def plain(self) -> Mapping[str, Tensor]:
        """Biases and norm scales, on `device`."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def bytes_in_ram(self) -> int | None: ...

    @property
    def streaming(self) -> str:
        """A value of config.STREAMING."""
        ...


class WeightStore:
    """All tensors of one network by their original names: matrices packed, the rest plain.

    `packed` holds every `….weight` of a Linear (embedders as bf16), `plain` biases and norm scales.

    Args:
        streaming: a value of config.STREAMING, which `prepare` follows.
        on_disk: the blocks in the order of the network, if their bytes are not in RAM.
    """

    def __init__(
        self,
        packed: dict[str, PackedWeight],
        plain: dict[str, Tensor],
        *,
        streaming: str = "off",
        on_disk: Sequence[DiskBlock] | None = None,
    ) -> None:
        self.packed = packed
        self.plain = plain
        self.streaming = streaming
        self.device = next(iter(packed.values())).device
        self.bytes_moved = 0
        self.stream: BlockStream | None = None
        self._blocks = blocks_of(packed)
        self._layouts = [Layout.of(dict(self._block_tensors(names))) for names in self._blocks]
        self._on_disk = on_disk
        self._in_ram: dict[int, HostBlock] = {}
        self._resident = self._residents(None)
        if on_disk:
            self._begin_stream()

    def prepare(self, device: torch.device | str, free_bytes: float | None = None) -> None:
        """Bring to `device` what computes there by the choice of streaming.

        Args:
            free_bytes: what the weights may take there, or None for all that they want. "auto"
                keeps as many blocks as fit, and at least room for two of them.

        Raises:
            ValueError: if the device cannot hold one of the formats.
        """
        budgets = {"auto": free_bytes, "ram": 0, "disk": 0}
        self.place(device, budgets.get(self.streaming))

    def place(self, device: torch.device | str, budget: float | None = None) -> None:
        """Bring every byte to `device`, or all but blocks that do not fit into `budget` bytes;
        free when it already is there.

        When the device runs out of memory on the way, every byte goes back where it came from.

        Raises:
            ValueError: if the device cannot hold one of the formats; nothing was moved.
        """
        for format in {weight.format for weight in self.packed.values()}:
            require_format_on(format, device)
        before = self.device, self._resident
        after = torch.device(device), self._residents(budget)
        if after == before:
            return
        try:
            moved = self._move(*after)
        except BaseException:
            self._move(*before)
            raise
        self.bytes_moved += moved
        if self.stream:
            logger.info(
                f"{len(self._resident)} of {len(self._blocks)} blocks stay on {device}; the others "
                f"come from {'disk' if self._on_disk else 'RAM'} when they are used."
            )

    @property
    def num_bytes(self) -> int:
        packed = sum(weight.num_bytes for weight in self.packed.values())
        return packed + sum(tensor.nbytes for tensor in self.plain.values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of all that is on the device, the slots of streamed blocks among them."""
        return self._split(self._resident)[0]

    @property
    def wanted_bytes(self) -> int:
        """Bytes on the device when `prepare` has all the memory that it wants."""
        return self.split(None if self.streaming in ("auto", "off") else 0)[0]

    @property
    def bytes_in_ram(self) -> int:
        """Bytes that lie in RAM, each once: all on a CPU, else those of streamed blocks."""
        if self.device == HOST:
            return self._bytes_outside_blocks if self._on_disk else self.num_bytes
        return 0 if self._on_disk else self._split(self._resident)[1]

    def split(self, budget: float | None) -> tuple[int, int]:
        """Bytes on a device with `budget` bytes for the store, slots among them, and beside it."""
        return self._split(self._residents(budget))

    def content_hash(self) -> str:
        """SHA-256 over the names and bytes of every tensor, as they compute."""
        digest = hashlib.sha256()
        for name, tensor in self._tensors():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> list[Tensor]:
        """All that the store holds."""
        return [tensor for _, tensor in self._tensors()]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self.packed):
            data, scale = self.packed[name].fetch()
            yield name, data
            if scale is not None:
                yield f"{name}.scale", scale
        for name in sorted(self.plain):
            yield name, self.plain[name]

    def _block_tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        for name in names:
            weight = self.packed[name]
            yield name, weight.data
            if weight.scale is not None:
                yield f"{name}.scale", weight.scale

    def _residents(self, budget: float | None) -> frozenset[int]:
        """The blocks that stay on a device with `budget` bytes for the store."""
        sizes = [layout.num_bytes for layout in self._layouts]
        if self._on_disk:
            return frozenset()
        if budget is None or budget >= self.num_bytes:
            return frozenset(range(len(sizes)))
        return resident_blocks(sizes, budget - self._bytes_outside_blocks)

    @property
    def _bytes_outside_blocks(self) -> int:
        return self.num_bytes - sum(map(self._block_bytes, range(len(self._blocks))))

    def _block_bytes(self, index: int) -> int:
        return sum(self.packed[name].num_bytes for name in self._blocks[index])

    def _split(self, resident: frozenset[int]) -> tuple[int, int]:
        streamed = [index for index in range(len(self._blocks)) if index not in resident]
        beside = sum(map(self._block_bytes, streamed))
        slots = slot_bytes([self._layouts[index].num_bytes for index in streamed])
        return self.num_bytes - beside + slots, beside

    def _move(self, device: torch.device, resident: frozenset[int]) -> int:
        """Bring everything where it belongs; returns how many bytes came from elsewhere."""
        before, self._resident = self._resident, resident
        moved = self._moved_bytes(device, before)
        self._end_stream()
        # Outside inference mode, in which the host runs its nodes: see _FrozenLinear.
        with torch.inference_mode(False), torch.no_grad():
            streamed = self._streamed()
            if not self._on_disk:
                for index in streamed:  # before others go to the device: it makes room
                    self._to_ram(index)
            elsewhere = {name for index in streamed for name in self._blocks[index]}
            for name, weight in self.packed.items():
                if name not in elsewhere:
                    weight.to(device)
            self.plain = {name: tensor.to(device) for name, tensor in self.plain.items()}
        if device != HOST:
            self._in_ram = {i: block for i, block in self._in_ram.items() if i in streamed}
        self.device = device
        self._begin_stream()
        return moved

    def _moved_bytes(self, device: torch.device, before: frozenset[int]) -> int:
        """How many bytes leave their place, the slots aside."""
        moved = 0 if device == self.device else self._bytes_outside_blocks
        for index in range(len(self._blocks)):
            old = self.device if index in before else HOST
            new = device if index in self._resident else HOST
            moved += self._block_bytes(index) if old != new and not self._on_disk else 0
        return moved

    def _streamed(self) -> list[int]:
        return [index for index in range(len(self._blocks)) if index not in self._resident]

    def _to_ram(self, index: int) -> None:
        """One run of bytes in RAM for a block, and its weights as views of it."""
        names, layout = self._blocks[index], self._layouts[index]
        if index not in self._in_ram:
            self._in_ram[index] = HostBlock(layout, dict(self._block_tensors(names)))
        for name in names:
            weight, data = self.packed[name], self._in_ram[index].data
            weight.data = layout.pieces[name].of(data)
            if weight.scale is not None:
                weight.scale = layout.pieces[f"{name}.scale"].of(data)

    def _begin_stream(self) -> None:
        streamed = self._streamed()
        if not streamed:
            return
        layouts = [self._layouts[index] for index in streamed]
        if self._on_disk:
            feed = DiskFeed([*zip(self._on_disk, layouts, strict=True)], self.device)
        else:
            feed = RamFeed([self._in_ram[index] for index in streamed], self.device)
        self.stream = BlockStream(feed, [layout.num_bytes for layout in layouts], self.device)
        for position, index in enumerate(streamed):
            pieces = self._layouts[index].pieces
            for name in self._blocks[index]:
                self.packed[name].streamed = Streamed(
                    self.stream, position, pieces[name], pieces.get(f"{name}.scale")
                )

    def _end_stream(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.stream = None
        for weight in self.packed.values():
            weight.streamed = None
