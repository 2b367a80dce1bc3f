"""Which texts are trained for one caption: with trigger, prefix, suffix, tags in several orders.

The seed fixes what a run trains: variants are a function of seed, record and caption, so each is
encoded once; which of them a sample takes is drawn from the generator of its micro-step.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence

import torch

from .captions import TRIGGER_MARK, CaptionSettings

_NO_SPACE_BEFORE = ",.;:!?，。；：！？、"


def caption_text(caption: str, settings: CaptionSettings) -> str:
    """The text of a caption in its own order: with trigger, prefix and suffix."""
    return _with_ends(_with_trigger(caption, settings), settings)


def caption_variants(
    caption: str, settings: CaptionSettings, seed: int, record: str
) -> tuple[str, ...]:
    """The distinct texts that are trained for one caption of the record named `record`.

    Without shuffle that is one. With it, the tags in their own order come first, then in random
    ones, `settings.variants` in all or as many as there are. Equal arguments give equal texts, on
    every machine.
    """
    text = _with_trigger(caption, settings)
    if not settings.shuffle:
        return (_with_ends(text, settings),)
    mark = settings.separator.strip() or settings.separator
    tags = tuple(tag.strip() for tag in text.split(mark) if tag.strip())
    kept, loose = tags[: settings.keep_tokens], tags[settings.keep_tokens :]
    orders = {loose: None}
    num_orders = _num_orders(loose, settings.variants)
    draw = 0
    while len(orders) < num_orders:
        orders[_shuffled(loose, f"{seed}/{record}/{caption}/{draw}")] = None
        draw += 1
    between = f"{settings.separator.strip()} "
    texts = (_with_ends(between.join(kept + order), settings) for order in orders)
    return tuple(dict.fromkeys(texts))


def choose_text(texts: Sequence[Sequence[str]], dropout: float, generator: torch.Generator) -> str:
    """The text of one sample, from the variants of each of its record's captions.

    Empty with the probability `dropout`, else a caption and then a variant of it, each
    with equal probability. Takes three numbers from the generator, whatever comes out.
    """
    drop, caption, variant = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    if drop < dropout:
        return ""
    variants = texts[int(caption * len(texts))]
    return variants[int(variant * len(variants))]


def _with_trigger(caption: str, settings: CaptionSettings) -> str:
    trigger = settings.trigger.strip()
    text = _marked(caption, settings)
    if any(trigger in part for part in (text, *_ends(settings))):  # also an empty one
        return text
    return f"{trigger}{settings.separator.strip()} {text}" if text else trigger


def _with_ends(text: str, settings: CaptionSettings) -> str:
    prefix, suffix = _ends(settings)
    text = f"{prefix} {text}".strip()
    return f"{text}{suffix}" if suffix[:1] in _NO_SPACE_BEFORE else f"{text} {suffix}".strip()


def _ends(settings: CaptionSettings) -> tuple[str, str]:
    return _marked(settings.prefix, settings), _marked(settings.suffix, settings)


def _marked(text: str, settings: CaptionSettings) -> str:
    trigger = settings.trigger.strip()
    return (text.replace(TRIGGER_MARK, trigger) if trigger else text).strip()


def _num_orders(tags: Sequence[str], limit: int) -> int:
    """How many distinct orders there are: n! over the m! of m equal tags, up to `limit`."""
    counts: Counter[str] = Counter()
    number = 1
    for length, tag in enumerate(tags, 1):
        counts[tag] += 1
        number = number * length // counts[tag]
        if number >= limit:
            return limit
    return number


def _shuffled(tags: tuple[str, ...], key: str) -> tuple[str, ...]:
    # Not torch.randperm: another version of torch may draw other orders, and each is encoded once.
    ranks = struct.unpack(f"<{len(tags)}Q", hashlib.shake_256(key.encode()).digest(8 * len(tags)))
    return tuple(tags[index] for index in sorted(range(len(tags)), key=ranks.__getitem__))
