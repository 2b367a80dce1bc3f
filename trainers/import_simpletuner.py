"""A multidatabackend.json of SimpleTuner (documentation/DATALOADER.md there)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .buckets import Mode, Resolution
from .captions import CaptionSettings, CaptionSource
from .checks import require
from .config import Schedule
from .dataset import PictureSettings
from .import_settings import (
    ANY_ASPECT,
    FolderPlan,
    Limits,
    Notes,
    Places,
    Plan,
    Settings,
    sections,
    sized,
)
from .metadata_files import one_or_more, read_table
from .pictures import Crop

_CACHES = "{0}: Cache Latents and Encode Prompts keep everything below output/atelier/cache."
_DELETES = "{0}: no picture is ever deleted."
_EPOCHS = "{0}: a dataset starts at a step and stays until the end."
_EVERY_PICTURE = "{0}: folders are looked through each time, which takes seconds."
_PAIRS = "{0}: FLUX.1 LoRAs are trained from pictures and captions only."
_SHRUNK = "{0}: pictures are always shrunk until they just cover their size, then cropped."

_WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "cache_dir": (None, _CACHES),
    "cache_dir_vae": (None, _CACHES),
    "caption_filter_list": (None, "{0}: captions stay as they are. Change them in their files."),
    "conditioning": ([], _PAIRS),
    "conditioning_image_embeds": (None, _CACHES),
    "default": (None, _CACHES),
    "delete_problematic_images": (False, _DELETES),
    "delete_unwanted_images": (False, _DELETES),
    "delete_nsfw_images": (False, _DELETES),
    "end_epoch": (None, _EPOCHS),
    "end_step": (None, _EPOCHS),
    "hash_filenames": (None, _CACHES),
    "image_embeds": (None, _CACHES),
    "max_num_samples": (None, "{0}: all pictures of a folder are trained."),
    "max_upscale_threshold": (None, "{0}: use minimum_image_size."),
    "maximum_image_size": (None, _SHRUNK),
    "metadata_backend": ("discovery", _EVERY_PICTURE),
    "metadata_update_interval": (None, _EVERY_PICTURE),
    "preserve_data_backend_cache": (None, _CACHES),
    "skip_file_discovery": ("", _EVERY_PICTURE),
    "slider_strength": (None, "{0}: there are no sliders here."),
    "start_epoch": (1, _EPOCHS),
    "target_downsample_size": (None, _SHRUNK),
    "text_embeds": (None, _CACHES),
    "timestep_sampling_offset": (0, "{0}: all pictures draw their noise alike."),
    "train_batch_size": (None, "{0}: the batch size is an input of Train LoRA."),
    "vae_cache_clear_each_epoch": (None, _CACHES),
    "vae_cache_disable": (None, _CACHES),
    "vae_cache_ondemand": (None, _CACHES),
    "write_batch_size": (None, _CACHES),
}
_SKIPPED = {
    "text_embeds": _CACHES,
    "image_embeds": _CACHES,
    "conditioning_image_embeds": _CACHES,
    "video": "{0}: only pictures are trained.",
    "audio": "{0}: only pictures are trained.",
    "eval": "{0}: no pictures are set aside for validation.",
}
_CROPS: dict[str, Crop] = {"random": "random", "center": "center", "corner": "top left"}
_SHAPES: dict[str, Mode] = {
    "square": "square",
    "preserve": "preserved",
    "closest": "buckets",
    "random": "random",
}
_SOURCES: dict[str, CaptionSource] = {
    "textfile": "text file",
    "filename": "file name",
    "parquet": "metadata file",
}
_SEPARATORS = {"comma": ",", "space": " ", "period": "."}


def is_simpletuner(config: Any) -> bool:
    """Whether it has the form of such a configuration."""
    named = {"instance_data_dir", "dataset_type", "cache_dir_vae", "caption_strategy"}
    return isinstance(config, list) and any(
        isinstance(backend, dict) and named & backend.keys() for backend in config
    )


def plan_simpletuner(config: Any, places: Places) -> Plan:
    """The backends with pictures of this machine, in their order.

    Raises:
        ValueError: a setting has a wrong value, or a folder is not there or not allowed.
    """
    notes = Notes()
    backends = {}
    for backend in sections(config, "backend", places.config, notes):
        name = backend.text("id", backend.place)
        backend.place = name
        require(
            name not in backends,
            f"Two backends of {places.config} have the id {name!r}. Give each its own.",
        )
        backends[name] = backend
    masks = {
        name: backend
        for name, backend in backends.items()
        if backend.text("dataset_type") == "conditioning"
        and backend.text("conditioning_type") == "mask"
    }
    folders = []
    for name, backend in backends.items():
        if name in masks or not _is_trained(backend):
            continue
        folders.append(_folder(backend, masks, places))
        backend.note_unused(_WITHOUT_COUNTERPART)
    trained = _with_equal_weights_left_out(folders)
    return Plan(tool="SimpleTuner", folders=trained, notes=notes.sentences())


def _is_trained(backend: Settings) -> bool:
    """Whether a backend has pictures to train on; else it is noted why not."""
    kind = backend.text("dataset_type", "image")
    place = backend.text("type", "local")
    for spelling in ("disabled", "disable"):
        if backend.flag(spelling):
            backend.note("{0}: it is left out.", spelling)
            return False
    if kind != "image":
        reason = _SKIPPED.get(kind, _PAIRS)
        backend.note(reason, "dataset_type")
        return False
    if place != "local":
        backend.note(
            "{0}: it is left out, since only folders of this machine are read. For a repository of "
            "the Hugging Face Hub use Hub Dataset.",
            "type",
        )
        return False
    if backend.number("probability", 1.0) == 0:
        backend.note("{0}: it is never drawn, so it is left out.", "probability")
        return False
    return True


def _with_equal_weights_left_out(folders: list[FolderPlan]) -> tuple[FolderPlan, ...]:
    """Equal probabilities are none: every picture comes in every epoch."""
    if len({plan.schedule.probability for plan in folders}) > 1:
        return tuple(folders)

    def without(plan: FolderPlan) -> FolderPlan:
        return dataclasses.replace(
            plan, schedule=dataclasses.replace(plan.schedule, probability=0.0)
        )

    return tuple(without(plan) for plan in folders)


def _folder(backend: Settings, masks: Mapping[str, Settings], places: Places) -> FolderPlan:
    folder = backend.text("instance_data_dir")
    require(
        bool(folder),
        f"There is no instance_data_dir ({backend.place}) in {places.config}. Add the folder of "
        "the pictures.",
    )
    repeats, start = backend.count("repeats"), backend.count("start_step")
    if repeats < 0:
        raise backend.fail("repeats", "0 or more")
    if backend.number("probability", 1.0) < 0:
        raise backend.fail("probability", "0 or more")
    table = _table(backend, places)
    return FolderPlan(
        folder=places.folder(folder),
        resolutions=(_resolution(backend),),
        repeats=repeats + 1,
        pictures=_pictures(backend),
        captions=_captions(backend),
        masks=_masks(backend, masks, places),
        schedule=Schedule(
            probability=backend.number("probability", 1.0),
            start_step=0 if start == 1 else start,  # 1 is the first step there
        ),
        is_regularization=backend.flag("is_regularisation_data")
        | backend.flag("is_regularization_data"),
        recursive=True,
        limits=_limits(backend),
        table=table,
        written=_read_table(backend, table) if table else None,
    )


def _pixels(backend: Settings, name: str, default: float = 0.0) -> float:
    """The side of a square with the size that a setting gives in the unit of the backend."""
    value = backend.number(name, default)
    in_megapixels = backend.text("resolution_type", "pixel_area") == "area"
    return math.sqrt(max(0.0, value) * 1e6) if in_megapixels else value


def _resolution(backend: Settings) -> Resolution:
    unit = backend.text("resolution_type", "pixel_area")
    if unit not in ("pixel", "area", "pixel_area"):
        raise backend.fail("resolution_type", "pixel, area or pixel_area")
    shape = backend.text("crop_aspect", "square") if backend.flag("crop") else "preserve"
    if shape not in _SHAPES:
        raise backend.fail("crop_aspect", "square, preserve, closest or random")
    side = _pixels(backend, "resolution", 1024 / 1000 if unit == "area" else 1024)
    size = sized(backend, "resolution", (side, side), step=64)
    if unit == "pixel" and shape != "square":
        backend.note(
            "{0}: there it is the shorter side, here the side of a square of equal area.",
            "resolution",
        )
    aspect = _max_aspect(backend, shape)
    return dataclasses.replace(size, mode=_SHAPES[shape], max_aspect=aspect)


def _max_aspect(backend: Settings, shape: str) -> float:
    aspects = backend.items("crop_aspect_buckets")
    if shape in ("square", "preserve"):
        return ANY_ASPECT
    if not aspects:
        return 2.0
    if not all(type(aspect) in (int, float) and aspect > 0 for aspect in aspects):
        raise backend.fail("crop_aspect_buckets", "a list of numbers above 0")
    backend.note("{0}: all shapes between the longest ones are used.", "crop_aspect_buckets")
    return float(max(max(aspect, 1 / aspect) for aspect in aspects))


def _pictures(backend: Settings) -> PictureSettings:
    style = backend.text("crop_style", "random")
    if not backend.flag("crop"):
        return PictureSettings()
    if style not in _CROPS:
        backend.note("{0}: faces are not looked for. The middle is kept.", "crop_style")
    return PictureSettings(crop=_CROPS.get(style, "center"))


def _limits(backend: Settings) -> Limits:
    is_side = backend.text("resolution_type", "pixel_area") == "pixel"
    smallest = _pixels(backend, "minimum_image_size")
    return Limits(
        min_side=smallest if is_side else 0.0,
        min_area=0.0 if is_side else smallest**2 * (1 - 1e-9),  # the root of an area, squared
        min_aspect=backend.number("minimum_aspect_ratio"),
        max_aspect=backend.number("maximum_aspect_ratio") or math.inf,
    )


def _captions(backend: Settings) -> CaptionSettings:
    strategy = backend.text("caption_strategy", "filename")
    prompt = backend.text("instance_prompt")
    is_whole = backend.flag("disable_multiline_split")
    before = prompt if backend.flag("prepend_instance_prompt") else ""
    if backend.flag("only_instance_prompt") or strategy == "instanceprompt":
        return CaptionSettings(source="instance prompt", instance_prompt=prompt)
    tags = backend.section("caption_shuffle")
    separator = tags.text("split_on", "comma")
    shuffle, count = tags.flag("enable"), tags.count("count", 1)
    if separator not in _SEPARATORS:
        raise tags.fail("split_on", "comma, space or period")
    if not tags.flag("include_original", True):
        tags.note("{0}: a caption's own order is always one of those trained.", "include_original")
    tags.note_unused({"seed": (None, "{0}: the orders follow from picture and caption.")})
    if strategy not in _SOURCES:
        raise backend.fail("caption_strategy", "textfile, filename, instanceprompt or parquet")
    return CaptionSettings(
        source=_SOURCES[strategy],
        lines="one" if is_whole else "each",
        missing="file name" if strategy == "parquet" else "error",
        prefix=before,
        separator=_SEPARATORS[separator],
        shuffle=shuffle,
        keep_tokens=tags.count("position_start"),
        variants=count + 1,
    )


def _masks(backend: Settings, masks: Mapping[str, Settings], places: Places) -> Path | None:
    named = backend.value("conditioning_data")
    found = None
    for name in named if isinstance(named, list) else [named] if named else []:
        if name in masks and not found:
            found = places.folder(masks[name].text("instance_data_dir"))
        else:
            backend.note(_PAIRS, "conditioning_data")
    return found


def _table(backend: Settings, places: Places) -> Path | None:
    section = backend.section("parquet")
    strategy = backend.text("caption_strategy", "filename")
    if strategy != "parquet" or backend.flag("only_instance_prompt"):
        return None
    if not section.text("path"):
        raise section.fail("path", "the path of a .parquet or .jsonl file")
    return places.file(section.text("path"))


def _read_table(backend: Settings, path: Path) -> dict[str, tuple[str, ...]]:
    """The captions by the names of the pictures."""
    section = backend.section("parquet")
    name_column = section.text("filename_column", "filename")
    columns = [section.text("caption_column", "caption"), section.text("fallback_caption_column")]
    columns = [column for column in columns if column]
    is_whole = section.flag("identifier_includes_extension")
    section.note_unused(
        dict.fromkeys(("path", "width_column", "height_column"), (None, _EVERY_PICTURE))
    )
    found: dict[str, tuple[str, ...]] = {}
    for line, row in read_table(path, [(column,) for column in (name_column, *columns)]):
        require(
            name_column in row and columns[0] in row,
            f"Line {line} of {path} has no column {name_column} and {columns[0]}. Its columns: "
            f"{', '.join(row) or '-'}.",
        )
        texts = next((row[column] for column in columns if row.get(column)), None)
        lines = texts if isinstance(texts, list) else [texts] if texts else []
        name = str(row[name_column]).replace("\\", "/")
        found[name if is_whole else f"{name}.png"] = one_or_more([str(text) for text in lines])
    return found
