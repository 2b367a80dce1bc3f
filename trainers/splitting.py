"""A dataset in two: what is trained on, and what is held out to measure on."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Literal

from .checks import require
from .dataset import Dataset, Subset

SplitUnit = Literal["percent", "pictures"]
SPLIT_UNITS: tuple[SplitUnit, ...] = ("percent", "pictures")


def split_dataset(dataset: Dataset, amount: int, unit: SplitUnit) -> tuple[Dataset, Dataset]:
    """(training, held out): `amount` percent or different pictures of every subset are held out.

    The pictures of a subset are ranked by a hash of their bytes, and the first ones are held out.
    So a picture that is added moves at most one other from one side to the other. A picture that
    is held out of one subset is held out of all: its copies, and itself at other sizes.

    Raises:
        ValueError: a subset would have no picture on one of the sides, or the amount is below 1.
    """
    require(amount >= 1, f"At least 1 of the {unit} must be held out, got {amount}.")
    chosen = {content for subset in dataset.subsets for content in _first(subset, amount, unit)}
    for subset in dataset.subsets:
        _require_rest(subset, chosen, f"{amount} {unit}")
    training, held_out = (
        Dataset(subsets=tuple(_side(subset, chosen, is_held_out) for subset in dataset.subsets))
        for is_held_out in (False, True)
    )
    return training, held_out


def _first(subset: Subset, amount: int, unit: SplitUnit) -> list[str]:
    """The contents that this subset holds out: at least one."""
    contents = sorted({record.content for record in subset.records}, key=_rank)
    number = max(1, round(len(contents) * amount / 100)) if unit == "percent" else amount
    return contents[:number]


def _rank(content: str) -> str:
    # Not the content's own digits: sizes of a picture are drawn from those.
    return hashlib.sha256(f"held out {content}".encode()).hexdigest()


def _require_rest(subset: Subset, chosen: set[str], asked: str) -> None:
    contents = {record.content for record in subset.records}
    require(
        bool(contents - chosen),
        f"Holding {asked} out of '{subset.name}' would leave nothing to train on: it has "
        f"{len(contents)} different pictures. Hold out fewer, or add pictures.",
    )


def _side(subset: Subset, chosen: set[str], is_held_out: bool) -> Subset:
    records = tuple(r for r in subset.records if (r.content in chosen) == is_held_out)
    return dataclasses.replace(subset, records=records)
