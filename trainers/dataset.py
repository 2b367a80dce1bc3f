"""Pictures and captions as a description: what to train on, without any pixels.

The caches turn it into tensors later.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from .buckets import Resolution, Size, is_enlarged
from .captions import CaptionSettings, listed
from .checks import require
from .config import ALWAYS, Schedule
from .files import read_bytes
from .masks import Mask, latent_weights, mask_image
from .pictures import PictureSettings, Transform, decode
from .references import Reference
from .scan import OnBadFile


@dataclass(frozen=True, kw_only=True)
class Record:
    """One picture and the texts it is trained with."""

    path: str
    """Absolute path of the picture."""
    texts: tuple[tuple[str, ...], ...]
    """One or more captions, and of each the variants that are encoded: trigger, prefix and suffix
    included."""
    content: str
    """SHA-256 of the file's bytes, in hex."""
    width: int
    """Pixels, after the EXIF rotation."""
    height: int
    """Pixels, after the EXIF rotation."""
    mask: Mask | None = None
    """Without one all of the picture counts."""
    reference: Reference | None = None
    """What a Kontext sees of it beside the noise. All of a subset have one, or none has."""
    repeats: int = 1
    """How often the picture is seen in an epoch."""

    @property
    def id(self) -> str:
        """Name of the sample wherever it lies: 16 hex digits of its bytes and its captions."""
        captions = "\0".join(variants[0] for variants in self.texts)
        return hashlib.sha256(f"{self.content}\0{captions}".encode()).hexdigest()[:16]


DEFAULT_CAPTIONS, DEFAULT_PICTURES = CaptionSettings(), PictureSettings()


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Records in a fixed order that are trained alike, at sizes of one area."""

    records: tuple[Record, ...]
    resolution: Resolution
    name: str
    pictures: PictureSettings = DEFAULT_PICTURES
    captions: CaptionSettings = DEFAULT_CAPTIONS
    on_bad_file: OnBadFile = "stop"
    """What is done with a picture that turns out to be bad when it is decoded."""
    schedule: Schedule = ALWAYS
    is_regularization: bool = False
    """Whether its pictures train towards what the model draws without the LoRA."""
    is_prior: bool = False
    """Whether they are of the class of what is learned, with a weight of their own."""
    told: tuple[str, ...] = ()
    """Warnings of reading it."""

    def size_of(self, record: Record) -> Size:
        """(width, height) in pixels at which the record is trained."""
        return self.resolution.size_for(record.width, record.height, record.content)

    def transforms(self, record: Record) -> tuple[Transform, ...]:
        """What is encoded of a record's picture, one or, with its mirror image, two."""
        return self.pictures.transforms(self.size_of(record), record.content)

    def reference_transforms(self, record: Record) -> tuple[Transform, ...]:
        """What is encoded of its reference, one for each of `transforms`. References of the shape
        of their picture get its size and its crop, so that the pixels of both lie together."""
        reference = record.reference
        if reference is None:
            return ()
        size = self.resolution.size_for(reference.width, reference.height, record.content)
        return self.pictures.transforms(size, record.content)

    @property
    def num_samples(self) -> int:
        """Pictures seen in one epoch."""
        return sum(record.repeats for record in self.records)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what trains but is probably not meant."""
        small = [_file_name(record) for record in self.records if self._is_upscaled(record)]
        silent = [_file_name(record) for record in self.records if ("",) in record.texts]
        messages = [*self.told]
        if small:
            messages.append(f"Pictures enlarged to the training size: {listed(small)}.")
        if silent:
            messages.append(f"Pictures with an empty caption: {listed(silent)}.")
        return tuple(messages)

    def without_small(self, min_side: int) -> Subset:
        """Without the pictures that have a side of fewer than `min_side` pixels, which are told.

        Raises:
            ValueError: if none is left.
        """
        kept = tuple(r for r in self.records if min(r.width, r.height) >= min_side)
        small = [_file_name(r) for r in self.records if min(r.width, r.height) < min_side]
        if not small:
            return self
        require(
            bool(kept),
            f"All pictures of '{self.name}' have a side of fewer than {min_side} pixels. Lower "
            "min_side of Picture Settings.",
        )
        sentence = f"Left out, with a side of fewer than {min_side} pixels: {listed(small)}."
        return dataclasses.replace(self, records=kept, told=(*self.told, sentence))

    def _is_upscaled(self, record: Record) -> bool:
        return is_enlarged((record.width, record.height), self.size_of(record))


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a training sees: one subset, or several that take turns."""

    subsets: tuple[Subset, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every distinct text that is encoded, in the order of the records."""
        records = (record for subset in self.subsets for record in subset.records)
        texts = (text for record in records for variants in record.texts for text in variants)
        return tuple(dict.fromkeys(texts))

    @property
    def num_samples(self) -> int:
        """Pictures seen in one epoch."""
        return sum(subset.num_samples for subset in self.subsets)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences about what trains but is probably not meant, each once."""
        return tuple(dict.fromkeys(text for subset in self.subsets for text in subset.warnings))

    def at_sizes(self, sizes: Sequence[Size]) -> Dataset:
        """This, and every picture of it once more at each further (width, height) in pixels."""
        further = (
            dataclasses.replace(subset, resolution=subset.resolution.at(size))
            for size in sizes
            for subset in self.subsets
        )
        return Dataset(subsets=(*self.subsets, *further))

    def scheduled(
        self, schedule: Schedule, *, is_regularization: bool, is_prior: bool = False
    ) -> Dataset:
        """This with one schedule for all of it: subsets share the probability by their samples.

        Raises:
            ValueError: if it is to be both for regularization and of class pictures.
        """
        require(
            not (is_regularization and is_prior),
            "A dataset is either for regularization, where the model without the LoRA teaches, or "
            "of class pictures, which are learned as they are. Turn is_regularization or is_prior "
            "off.",
        )

        def share(subset: Subset) -> Schedule:
            probability = schedule.probability * subset.num_samples / self.num_samples
            return dataclasses.replace(schedule, probability=probability)

        return Dataset(
            subsets=tuple(
                dataclasses.replace(
                    subset,
                    schedule=share(subset),
                    is_regularization=is_regularization,
                    is_prior=is_prior,
                )
                for subset in self.subsets
            )
        )


def open_picture(record: Record | Reference) -> Image.Image:
    """The decoded picture of a record, or its reference.

    Raises:
        ValueError: the file is gone, or its content is no longer the one the record describes.
    """
    return decode(_read(record.path, record.content), record.path)


def open_mask(mask: Mask) -> Image.Image:
    """The decoded mask of a record. Raises ValueError as `open_picture`."""
    return mask_image(mask, _read(mask.path, mask.content))


def mask_weights(mask: Mask, how: Transform) -> Tensor:
    """Weights [h, w] in 0..1 of the latents of the picture that `how` transforms.

    Raises:
        ValueError: as `open_picture`.
    """
    return latent_weights(open_mask(mask), how)


def _read(path: str, content: str) -> bytes:
    data = read_bytes(path)
    require(
        hashlib.sha256(data).hexdigest() == content,
        f"The picture {path} changed after the dataset was read. Queue the graph again.",
    )
    return data


def _file_name(record: Record) -> str:
    return Path(record.path).name
