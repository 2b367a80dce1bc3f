"""A dataset configuration of kohya's sd-scripts (docs/config_README-en.md there).

[general] holds for all [[datasets]], and a dataset for its [[datasets.subsets]].
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .buckets import Resolution
from .captions import CaptionSettings
from .checks import require
from .dataset import PictureSettings
from .files import read_bytes
from .import_settings import (
    ANY_ASPECT,
    FolderPlan,
    Notes,
    Places,
    Plan,
    Settings,
    sections,
    sized,
)
from .masks import ALPHA
from .metadata_files import is_text, one_or_more
from .pictures import Filter

_INPUT_OF_TRAINING = "{0}: this is an input of Train LoRA."
_MAY_BE_LEFT = "{0}: this is not needed, headers and latents are remembered anyway."
_TAGS = "{0}: tags are shuffled or kept, never left out one by one."
_MARKS = "{0}: this sign has no meaning here. Take it out of the captions."
_PIXELS = "{0}: pictures are cropped and mirrored, and else stay as they are."
_VALIDATION = "{0}: no pictures are set aside for validation."

_WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "batch_size": (None, _INPUT_OF_TRAINING),
    "cache_info": (False, _MAY_BE_LEFT),
    "caption_dropout_every_n_epochs": (
        0,
        "{0}: captions are left out by a share of the samples, not of the epochs.",
    ),
    "caption_tag_dropout_rate": (0, _TAGS),
    "color_aug": (False, _PIXELS),
    "custom_attributes": ({}, "{0}: nothing of it is used here."),
    "debug_dataset": (False, "{0}: use Inspect Dataset."),
    "face_crop_aug_range": (None, _PIXELS),
    "keep_tokens_separator": ("", _MARKS),
    "max_token_length": (None, "{0}: the length is an input of Encode Prompts."),
    "network_multiplier": (1.0, "{0}: the LoRA has its full strength on every picture."),
    "prior_loss_weight": (1.0, "{0}: set prior_weight of Preservation Settings."),
    "secondary_separator": ("", _MARKS),
    "token_warmup_min": (1, _TAGS),
    "token_warmup_step": (0, _TAGS),
    "validation_seed": (None, _VALIDATION),
    "validation_split": (0.0, _VALIDATION),
}
_FILTERS: dict[str, Filter] = {"lanczos": "lanczos", "bicubic": "bicubic", "cubic": "bicubic"}


def is_kohya(config: Any) -> bool:
    """Whether it has the form of such a configuration."""
    datasets = config.get("datasets") if isinstance(config, dict) else None
    return isinstance(datasets, list) and any(
        isinstance(dataset, dict) and "subsets" in dataset for dataset in datasets
    )


def plan_kohya(config: Any, places: Places) -> Plan:
    """The subsets of all datasets, in their order.

    Raises:
        ValueError: a setting has a wrong value, or a folder is not there or not allowed.
    """
    notes = Notes()
    whole = Settings(places.config, "the file", config, notes)
    general = Settings(places.config, "general", whole.value("general") or {}, notes)
    folders: list[FolderPlan] = []
    for dataset in sections(whole.value("datasets"), "dataset", places.config, notes, general):
        resolution = _resolution(dataset)
        named: set[tuple[str, str]] = set()
        parts = dataset.value("subsets")
        place = f"{dataset.place}, subset"
        for subset in sections(parts, place, places.config, notes, dataset):
            name = (subset.text("image_dir"), subset.text("metadata_file"))
            if name in named:
                subset.note("{0}: it stands in this dataset before, and counts once.", "image_dir")
            else:
                folders.append(_folder(subset, resolution, places))
                subset.note_unused(_WITHOUT_COUNTERPART)
            named.add(name)
        dataset.note_unused(_WITHOUT_COUNTERPART)
    general.note_unused(_WITHOUT_COUNTERPART)
    whole.note_unused({})
    return Plan(tool="kohya sd-scripts", folders=tuple(folders), notes=notes.sentences())


def _resolution(dataset: Settings) -> Resolution:
    given = dataset.value("resolution")
    sides = given if isinstance(given, list) else [given, given]
    if len(sides) != 2 or not all(type(side) is int for side in sides):
        raise dataset.fail("resolution", "a number of pixels or a list of width and height")
    in_buckets = dataset.flag("enable_bucket")
    step = dataset.count("bucket_reso_steps", 64)
    shortest = dataset.count("min_bucket_reso", 256)
    longest = dataset.count("max_bucket_reso", 1024)
    stays_small = dataset.flag("bucket_no_upscale")
    if in_buckets and step not in (16, 64):
        dataset.note("{0}: sides of buckets are multiples of 16 or 64 pixels.", "bucket_reso_steps")
    size = sized(dataset, "resolution", (sides[0], sides[1]), step=step)
    if not in_buckets:
        return size
    if stays_small:  # kohya too makes a size of each shape then, and minds neither limit
        return replace(size, mode="preserved", upscale=False, max_aspect=ANY_ASPECT)
    area = size.width * size.height
    if not 0 < shortest <= longest:
        raise dataset.fail("min_bucket_reso", "above 0, and not above max_bucket_reso")
    longest = max(min(longest, area / shortest), area**0.5)
    return replace(size, mode="buckets", max_aspect=longest**2 / area)


def _folder(subset: Settings, resolution: Resolution, places: Places) -> FolderPlan:
    require(
        bool(subset.text("image_dir")),
        f"There is no image_dir ({subset.place}) in {places.config}. Add the folder of the "
        "pictures.",
    )
    many_lines = subset.flag("enable_wildcard")
    table = subset.text("metadata_file")
    return FolderPlan(
        folder=places.folder(subset.text("image_dir")),
        resolutions=(resolution,),
        repeats=_repeats(subset),
        pictures=_pictures(subset),
        captions=_captions(subset, has_table=bool(table), many_lines=many_lines),
        masks=_masks(subset, places),
        is_prior=_is_prior(subset),
        table=places.file(table) if table else None,
        written=_table(places.file(table), many_lines=many_lines) if table else None,
    )


def _repeats(subset: Settings) -> int:
    repeats = subset.count("num_repeats", 1)
    if repeats < 1:
        raise subset.fail("num_repeats", "1 or more")
    return repeats


def _pictures(subset: Settings) -> PictureSettings:
    wanted = subset.text("resize_interpolation", "lanczos")
    if wanted not in _FILTERS:
        subset.note("{0}: pictures are resampled by lanczos or bicubic.", "resize_interpolation")
    return PictureSettings(
        crop="random" if subset.flag("random_crop") else "center",
        filter=_FILTERS.get(wanted, "lanczos"),
        flip=subset.flag("flip_aug"),
    )


def _captions(subset: Settings, *, has_table: bool, many_lines: bool) -> CaptionSettings:
    if many_lines:
        subset.note(
            "{0}: one line of a caption is drawn for each sample, words in braces stay.",
            "enable_wildcard",
        )
    prefix, separator = subset.text("caption_prefix"), subset.text("caption_separator", ",")
    extension = subset.text("caption_extension", ".caption")
    suffix = subset.text("caption_suffix")
    shuffle = subset.flag("shuffle_caption")
    if shuffle:
        for name, text in (("caption_prefix", prefix), ("caption_suffix", suffix)):
            if text:
                subset.note("{0}: it stays at its end and is never shuffled.", name)
    # There the tags of the prefix count, here only those of the caption.
    kept = max(0, subset.count("keep_tokens") - (prefix.count(separator) if separator else 0))
    return CaptionSettings(
        source="metadata file" if has_table else "text file",
        lines="each" if many_lines else "first",
        extension=extension,
        default=subset.text("class_tokens"),
        prefix=prefix,
        suffix=suffix,
        separator=separator,
        shuffle=shuffle,
        keep_tokens=kept if shuffle else 0,
        dropout=subset.number("caption_dropout_rate"),
    )


def _masks(subset: Settings, places: Places) -> str | Path | None:
    folder = subset.text("conditioning_data_dir")
    if subset.flag("alpha_mask"):
        return ALPHA
    if not folder:
        return None
    subset.note("{0}: these are taken as masks, as with --masked_loss.", "conditioning_data_dir")
    return places.folder(folder)


def _is_prior(subset: Settings) -> bool:
    if not subset.flag("is_reg"):
        return False
    subset.note(
        "{0}: here these pictures are seen as often as their repeats say, not as often as the "
        "others.",
        "is_reg",
    )
    return True


def _table(path: Path, *, many_lines: bool) -> dict[str, tuple[str, ...]]:
    """The captions of {path or name of a picture: {"caption": …, "tags": …}}."""
    data = read_bytes(path)
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        entries = None
    found: dict[str, tuple[str, ...]] = {}
    for name, entry in (entries if isinstance(entries, dict) else {"": None}).items():
        values = entry if isinstance(entry, dict) else {}
        caption, tags = values.get("caption") or "", values.get("tags") or ""
        require(
            isinstance(entry, dict) and is_text(name) and is_text(caption) and is_text(tags),
            f"The file {path} is no metadata of kohya's sd-scripts: it must hold the caption or "
            "the tags of each picture as texts.",
        )
        lines = caption.splitlines()[: None if many_lines else 1] or [""]
        texts = [", ".join(filter(None, (line.strip(), tags.strip()))) for line in lines]
        found[name.replace("\\", "/").rpartition("/")[2]] = one_or_more(texts)
    return found
