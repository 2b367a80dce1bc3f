"""Block streaming: blocks that do not stay on the device come one ahead of their use.

Nothing announces a block. It is fetched when one of its weights is asked for, which the forward
pass, the recomputation of gradient checkpointing and the backward pass all do in the same way. The
bytes in RAM or on disk are the original: what was fetched is dropped, never written back.
"""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger("atelier")

HOST = torch.device("cpu")
"""Where the bytes of blocks lie that are streamed from RAM."""
_ALIGNMENT = 256
"""Bytes: every tensor of a block begins at a multiple, as in memory of its own."""
_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.")


def blocks_of(names: Iterable[str]) -> list[list[str]]:
    """Those of the names that belong to blocks, by block, in the order of the network."""
    blocks: dict[tuple[str, int], list[str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        if match:
            blocks.setdefault((match.group(1), int(match.group(2))), []).append(name)
    return [blocks[key] for key in sorted(blocks)]


def resident_blocks(sizes: Sequence[int], room: float) -> frozenset[int]:
    """The blocks that stay on a device with `room` bytes for blocks, beside the slots of the rest.

    They lie evenly among the others, so that each computes while a block after it comes: with the
    resident ones in a row, the copying would wait for all of them. A little more or less room keeps
    the same blocks but one: the order in which they are chosen does not depend on it.
    """
    if sum(sizes) <= room:
        return frozenset(range(len(sizes)))
    order = _spread(len(sizes))
    kept = max(0, len(order) - 1)
    while kept and _bytes_on_device(sizes, order[:kept]) > room:
        kept -= 1
    return frozenset(order[:kept])


def _spread(count: int) -> list[int]:
    """0 … count - 1 such that every beginning is spread evenly: by their bits in reverse."""
    digits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: int(f"{index:0{digits}b}"[::-1], 2))


def _bytes_on_device(sizes: Sequence[int], resident: Sequence[int]) -> int:
    kept = {*resident}
    streamed = [size for index, size in enumerate(sizes) if index not in kept]
    return sum(sizes) - sum(streamed) + slot_bytes(streamed)


def slot_bytes(sizes: Sequence[int]) -> int:
    """Bytes of the slots for streamed blocks of these sizes: the one in use, the one coming."""
    return min(2, len(sizes)) * max(sizes, default=0)


@dataclass(frozen=True)
class Piece:
    """A tensor among the bytes of its block."""

    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: torch.Size

    def bytes_of(self, block: Tensor) -> Tensor:
        return block[self.start : self.start + self.num_bytes]

    def of(self, block: Tensor) -> Tensor:
        """The tensor, as a view of the bytes of the block."""
        return self.bytes_of(block).view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one block lie in a single run of bytes, so that one copy brings all."""

    pieces: dict[str, Piece]
    num_bytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        pieces, end = {}, 0
        for name, tensor in tensors.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.nbytes
            pieces[name] = Piece(start, tensor.nbytes, tensor.dtype, tensor.shape)
        return cls(pieces, end)


class HostBlock:
    """The bytes of one block in RAM."""

    def __init__(self, layout: Layout, tensors: Mapping[str, Tensor]) -> None:
        self.data = torch.empty(layout.num_bytes, dtype=torch.uint8)
        self._is_locked = False
        for name, piece in layout.pieces.items():
            piece.of(self.data).copy_(tensors[name])

    def page_lock(self) -> None:
        """Let the GPU read the bytes while it computes; without it the copy only takes longer.

        In place: torch's own pinned memory is rounded up to a power of two, which for blocks of
        FLUX is half as much again.
        """
        if self._is_locked:
            return
        runtime, address = torch.cuda.cudart(), self.data.data_ptr()
        assert runtime is not None
        self._is_locked = int(runtime.cudaHostRegister(address, self.data.nbytes, 1)) == 0
        if self._is_locked:
            unlock = weakref.finalize(self, runtime.cudaHostUnregister, address)
            unlock.atexit = False  # CUDA may have ended by then
        else:
            _forget_cuda_error()
            logger.warning("A streamed block could not be pinned in RAM: it is copied slower.")


def _forget_cuda_error() -> None:
    """CUDA reports an error once more, to whatever runs next."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1).item()


def _marked(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


class CopyQueue:
    """Copies from RAM to a device: on a stream of their own with CUDA, else at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def is_beside(self) -> bool:
        """Whether copies run beside the computation."""
        return self._stream is not None

    def mark(self) -> torch.cuda.Event | None:
        """A mark behind all that the device has been asked to compute so far."""
        if self._stream is None:
            return None
        return _marked(torch.cuda.current_stream(self.device))

    def copy(
        self, target: Tensor, source: Tensor, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Ask for a copy behind the mark `after`; returns a mark behind the copy."""
        if self._stream is None:
            target.copy_(source)
            return None
        assert after is not None
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return _marked(self._stream)

    def hold_computation(self, arrival: torch.cuda.Event | None) -> None:
        """What is asked to compute from now on waits for the copy."""
        if arrival is not None:
            torch.cuda.current_stream(self.device).wait_event(arrival)

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class Slot:
    """Room for one block on the device, and which one is in it or on its way."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # written inside and outside of it
            self.data = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.position: int | None = None
        self.arrive: Callable[[], None] = lambda: None
        """Makes the computation wait until the block is here."""
        self.staging: Tensor | None = None
        self.staged: torch.cuda.Event | None = None


class Feed(Protocol):
    """Where blocks come from. Positions count the streamed blocks only."""

    def start(self, slot: Slot, position: int) -> Callable[[], None]:
        """Begin to bring a block into a slot that the computation has left by now; returns what
        makes the computation wait for it."""
        ...

    def close(self) -> None:
        """Return when nothing is on its way any more."""
        ...


class RamFeed:
    """Blocks from RAM, pinned there for CUDA."""

    def __init__(self, blocks: Sequence[HostBlock], device: torch.device) -> None:
        self._blocks, self._queue = blocks, CopyQueue(device)
        if self._queue.is_beside:
            for block in blocks:
                block.page_lock()

    def start(self, slot: Slot, position: int) -> Callable[[], None]:
        source = self._blocks[position].data
        arrival = self._queue.copy(slot.data[: source.numel()], source, self._queue.mark())
        return lambda: self._queue.hold_computation(arrival)

    def close(self) -> None:
        self._queue.finish()


class DiskBlock(Protocol):
    """A block in a file."""

    def read(self, layout: Layout, target: Tensor) -> None:
        """Read the bytes into `target`, in RAM. Raises ValueError if they are not as they were."""
        ...


class DiskFeed:
    """Blocks from a file, read by a thread ahead of their use."""

    def __init__(self, blocks: Sequence[tuple[DiskBlock, Layout]], device: torch.device) -> None:
        self._blocks, self._queue = blocks, CopyQueue(device)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="atelier-blocks")

    def start(self, slot: Slot, position: int) -> Callable[[], None]:
        arrival = self._reader.submit(self._read, slot, position, self._queue.mark())
        return lambda: self._queue.hold_computation(arrival.result())

    def _read(
        self, slot: Slot, position: int, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        block, layout = self._blocks[position]
        target = slot.data[: layout.num_bytes]
        if target.device.type == "cpu":
            block.read(layout, target)
            return None
        if slot.staging is None:
            slot.staging = torch.empty(
                slot.data.numel(), dtype=torch.uint8, pin_memory=self._queue.is_beside
            )
        if slot.staged is not None:  # the copy of the block before may still read from there
            slot.staged.synchronize()
        staging = slot.staging[: layout.num_bytes]
        block.read(layout, staging)
        slot.staged = self._queue.copy(target, staging, after)
        return slot.staged

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)
        self._queue.finish()


class BlockStream:
    """The blocks that are not resident, in two slots on the device: one in use, one coming.

    The direction is the step from the block used before to this one, and the next block in it is
    started at once. At an end of the sequence the next is the other end (sampling) or the block
    before (backward begins): whichever followed there the last time.
    """

    def __init__(self, feed: Feed, sizes: Sequence[int], device: torch.device) -> None:
        self._feed, self._sizes = feed, sizes
        self._slots = [Slot(max(sizes), device) for _ in range(min(2, len(sizes)))]
        self._current: Slot | None = None
        self._step = 1
        self._turns = False
        self.bytes_fetched = 0

    def fetch(self, position: int) -> Tensor:
        """The bytes of a block on the device, valid until another block is asked for.

        Raises:
            ValueError: if it is read from disk, and was changed there.
        """
        if self._current is None or self._current.position != position:
            with torch.no_grad():
                self._current = self._enter(position)
        return self._current.data

    def close(self) -> None:
        self._feed.close()

    def _enter(self, position: int) -> Slot:
        slot = self._slot_of(position) or self._start(position)
        try:
            slot.arrive()
        except BaseException:
            slot.position = None
            raise
        previous, self._current = self._current, slot
        if previous is not None and previous.position is not None:
            self._learn(previous.position, position)
        following = self._following(position)
        if self._slot_of(following) is None:
            self._start(following)
        return slot

    def _slot_of(self, position: int) -> Slot | None:
        return next((slot for slot in self._slots if slot.position == position), None)

    def _start(self, position: int) -> Slot:
        """Begin to bring a block into the slot that is not in use."""
        slot = next(slot for slot in self._slots if slot is not self._current)
        slot.position = None  # in case that the start fails
        slot.arrive = self._feed.start(slot, position)
        slot.position = position
        self.bytes_fetched += self._sizes[position]
        return slot

    def _learn(self, previous: int, position: int) -> None:
        if not self._is_inside(previous + self._step):
            self._turns = position == previous - self._step
        wraps = abs(position - previous) == len(self._sizes) - 1 > 1
        step = 1 if position > previous else -1
        self._step = -step if wraps else step

    def _following(self, position: int) -> int:
        following = position + self._step
        if self._is_inside(following):
            return following
        if self._turns:
            return max(0, min(len(self._sizes) - 1, position - self._step))
        return following % len(self._sizes)

    def _is_inside(self, position: int) -> bool:
        return 0 <= position < len(self._sizes)


@dataclass(frozen=True)
class Streamed:
    """A packed matrix as two pieces of a streamed block."""

    stream: BlockStream
    position: int
    data: Piece
    scale: Piece | None

    def fetch(self) -> tuple[Tensor, Tensor | None]:
        """Its bytes and scales on the device, valid until another block is asked for."""
        block = self.stream.fetch(self.position)
        return self.data.of(block), self.scale.of(block) if self.scale is not None else None
