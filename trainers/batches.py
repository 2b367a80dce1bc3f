"""Which pictures each micro-step sees: a pure function of the seed and the micro-step."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from .caches import LatentEntry, LatentSubset
from .flow import seeded

Batch = list[LatentEntry]
Item = TypeVar("Item")


class BatchOrder:
    """Shuffled batches of equally sized pictures of one subset, epoch after epoch.

    Each epoch holds every entry `repeats` times; where subsets have probabilities, each subset has
    its share of an epoch's batches instead. The last batch of a size may be smaller. At the start
    step of a subset a new epoch begins. Nothing is remembered between calls: resuming is asking for
    a later micro-step.
    """

    def __init__(
        self,
        subsets: Sequence[LatentSubset],
        *,
        batch_size: int,
        seed: int,
        gradient_accumulation: int = 1,
    ) -> None:
        self._seed = seed
        self._decks = [_Deck(subset, batch_size, gradient_accumulation) for subset in subsets]
        self._starts = sorted({deck.start for deck in self._decks}, reverse=True)

    @property
    def batches_per_epoch(self) -> int:
        """When all subsets have started."""
        return sum(deck.num_batches for deck in self._decks)

    def batch(self, micro_step: int) -> Batch:
        """The entries of the batch at `micro_step` (0, 1, …)."""
        start = next(start for start in self._starts if start <= micro_step)
        length = sum(deck.num_batches for deck in self._started(start))
        epoch, index = divmod(micro_step - start, length)
        return self._epoch(start, epoch)[index]

    def largest_batch(self, prompt_length: int) -> tuple[LatentEntry, int]:
        """One of the pictures of the batch with the most tokens, and their count.

        The network sees a token per 16x16 pixels of a picture and of its reference, and
        `prompt_length` more beside each.
        """

        def tokens(batch: tuple[LatentEntry, int]) -> int:
            entry, count = batch
            width, height, across, down = entry.sizes
            return count * ((width * height + across * down) // 256 + prompt_length)

        return max((batch for deck in self._decks for batch in deck.largest_batches()), key=tokens)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as the run
    def _epoch(self, start: int, epoch: int) -> list[Batch]:
        """The epochs since the micro-step `start` are counted from 0."""
        # No epoch is shorter than a batch, so no two of them have the same sum.
        generator = seeded(self._seed, "order", start + epoch)
        decks = self._started(start)
        counts = _shares(decks, generator)
        batches = [
            batch
            for deck, count in zip(decks, counts, strict=True)
            for batch in deck.draw(count, generator)
        ]
        return _shuffled(batches, generator)

    def _started(self, micro_step: int) -> list[_Deck]:
        return [deck for deck in self._decks if deck.start <= micro_step]


class _Deck:
    """The entries of one subset, dealt in batches of one size."""

    def __init__(self, subset: LatentSubset, batch_size: int, gradient_accumulation: int) -> None:
        self.probability = subset.schedule.probability
        self.start = subset.schedule.start_step * gradient_accumulation
        self._batch_size = batch_size
        # Sorted by content, so that the order on disk does not matter.
        repeated = [entry for entry in subset.entries for _ in range(entry.repeats)]
        self._groups: dict[tuple[int, int, int, int], list[LatentEntry]] = {}
        for entry in sorted(repeated, key=lambda e: (*e.sizes, e.record, e.name)):
            self._groups.setdefault(entry.sizes, []).append(entry)
        self.num_batches = sum(math.ceil(len(g) / batch_size) for g in self._groups.values())

    def largest_batches(self) -> list[tuple[LatentEntry, int]]:
        """Of each size one picture and the most at once."""
        return [(group[0], min(len(group), self._batch_size)) for group in self._groups.values()]

    def draw(self, count: int, generator: torch.Generator) -> list[Batch]:
        """`count` batches: whole passes over the subset, and a random part of one."""
        passes, rest = divmod(count, self.num_batches)
        batches = [batch for _ in range(passes) for batch in self._pass(generator)]
        if rest:
            batches += _shuffled(self._pass(generator), generator)[:rest]
        return batches

    def _pass(self, generator: torch.Generator) -> list[Batch]:
        batches = []
        for group in self._groups.values():
            shuffled = _shuffled(group, generator)
            starts = range(0, len(shuffled), self._batch_size)
            batches += [shuffled[start : start + self._batch_size] for start in starts]
        return batches


def _shares(decks: Sequence[_Deck], generator: torch.Generator) -> list[int]:
    """How many batches of an epoch each deck gives: all of its own, or by its probability.

    A share that is no whole number is rounded at random, so that over many epochs it is exact: the
    probabilities are laid end to end over the batches, from a random point (systematic sampling).
    """
    total = sum(deck.probability for deck in decks)
    lengths = [deck.num_batches for deck in decks]
    if not total:
        return lengths
    ends = itertools.accumulate(deck.probability / total * sum(lengths) for deck in decks)
    offset = float(torch.rand((), generator=generator))
    edges = [0, *(math.ceil(end - offset) for end in ends)]
    edges[-1] = sum(lengths)  # which rounding may have missed
    return [high - low for low, high in itertools.pairwise(edges)]


def _shuffled(items: Sequence[Item], generator: torch.Generator) -> list[Item]:
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
