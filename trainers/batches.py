"""Which pictures each micro-step sees: a pure function of the seed and the micro-step."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from .caches import LatentEntry
from .flow import seeded


class BatchOrder:
    """Shuffled batches of equally sized pictures, epoch after epoch.

    Each epoch holds every entry `repeats` times. A batch never mixes sizes, so the last batch of a
    size may be smaller. Nothing is remembered between calls: resuming is asking for a later step.
    """

    def __init__(self, entries: Sequence[LatentEntry], *, batch_size: int, seed: int) -> None:
        self._batch_size = batch_size
        self._seed = seed
        # Sorted by content, so that the order on disk does not matter.
        repeated = [entry for entry in entries for _ in range(entry.repeats)]
        self._groups: dict[tuple[int, int], list[LatentEntry]] = {}
        for entry in sorted(repeated, key=lambda e: (e.width, e.height, e.record, e.name)):
            self._groups.setdefault((entry.width, entry.height), []).append(entry)
        sizes = [math.ceil(len(group) / batch_size) for group in self._groups.values()]
        self.batches_per_epoch = sum(sizes)

    def batch(self, micro_step: int) -> list[LatentEntry]:
        """The entries of the batch at `micro_step` (0, 1, …)."""
        epoch, index = divmod(micro_step, self.batches_per_epoch)
        return self._epoch(epoch)[index]

    def largest_batch(self, prompt_length: int) -> tuple[int, int, int]:
        """Width, height and count of the pictures of the batch with the most tokens.

        The network sees a token per 16x16 pixels, and `prompt_length` more beside each picture.
        """

        def tokens(batch: tuple[int, int, int]) -> int:
            width, height, count = batch
            return count * (width * height // 256 + prompt_length)

        batches = ((*size, min(len(g), self._batch_size)) for size, g in self._groups.items())
        return max(batches, key=tokens)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run
    def _epoch(self, epoch: int) -> list[list[LatentEntry]]:
        generator = seeded(self._seed, "order", epoch)
        batches = []
        for group in self._groups.values():
            shuffled = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            starts = range(0, len(shuffled), self._batch_size)
            batches += [shuffled[start : start + self._batch_size] for start in starts]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
