"""The datasets of an ai-toolkit configuration: of a whole job, or only the part `datasets`."""

from __future__ import annotations

import dataclasses
from typing import Any

from .buckets import Resolution
from .captions import CaptionSettings
from .checks import require
from .dataset import PictureSettings
from .import_settings import ANY_ASPECT, FolderPlan, Notes, Places, Plan, Settings, sections, sized
from .masks import ALPHA

_CACHES = "{0}: Cache Latents and Encode Prompts keep everything on disk."
_OTHER_PICTURES = "{0}: FLUX.1 LoRAs are trained from pictures and captions only."
_PIXELS = "{0}: pictures are cropped and mirrored, and else stay as they are."
_LOADING = "{0}: it changes how files are read there, not what is trained."
_LOSS = "{0}: the loss of all pictures has one weight. Change their repeats or their probability."
_VIDEO = "{0}: only pictures are trained."
_CLASS_CAPTIONS = "{0}: set trigger and class_word of Preservation Settings."
_TAGS = "{0}: tags are shuffled or kept, never left out one by one."

_WITHOUT_COUNTERPART: dict[str, tuple[Any, str]] = {
    "augmentations": ([], _PIXELS),
    "augments": ([], _PIXELS),
    "batch_size": (None, "{0}: this is an input of Train LoRA."),
    "bucket_tolerance": (None, "{0}: sides are multiples of 16 pixels, as FLUX has them there."),
    "cache_clip_vision_to_disk": (False, _CACHES),
    "cache_latents": (None, _CACHES),
    "cache_latents_num_workers": (None, _LOADING),
    "cache_latents_to_disk": (None, _CACHES),
    "cache_text_embeddings": (None, _CACHES),
    "clip_image_path": ("", _OTHER_PICTURES),
    "control_path_1": ("", _OTHER_PICTURES),
    "control_path_2": ("", _OTHER_PICTURES),
    "control_path_3": ("", _OTHER_PICTURES),
    "controls": ([], _OTHER_PICTURES),
    "debug": (False, "{0}: use Inspect Dataset."),
    "diff_output_preservation": (False, _CLASS_CAPTIONS),
    "diff_output_preservation_class": ("", _CLASS_CAPTIONS),
    "do_audio": (False, _VIDEO),
    "do_i2v": (False, _VIDEO),
    "extra_values": ([], _OTHER_PICTURES),
    "fast_image_size": (False, _LOADING),
    "flip_y": (False, "{0}: pictures are mirrored left and right only."),
    "fps": (None, _VIDEO),
    "inpaint_path": ("", _OTHER_PICTURES),
    "load_image_when_caching_latents": (False, _LOADING),
    "loss_multiplier": (1, _LOSS),
    "mask_min_value": (0, "{0}: set unmasked_weight of Preservation Settings."),
    "network_weight": (1, "{0}: the LoRA has its full strength on every picture."),
    "num_frames": (1, _VIDEO),
    "num_workers": (None, _LOADING),
    "prefetch_factor": (None, _LOADING),
    "random_scale": (False, _PIXELS),
    "random_triggers": ([], "{0}: a dataset has one trigger word."),
    "random_triggers_max": (1, "{0}: a dataset has one trigger word."),
    "replacements": ([], "{0}: captions stay as they are. Change them in their files."),
    "scale": (1, _PIXELS),
    "shrink_video_to_frames": (True, _VIDEO),
    "shuffle_augmentations": (False, _PIXELS),
    "standardize_images": (False, _PIXELS),
    "token_dropout_rate": (0, _TAGS),
    "type": ("image", _VIDEO),
    "unconditional_path": ("", _OTHER_PICTURES),
    "use_short_captions": (False, "{0}: the captions are those of the text files."),
}


def is_ai_toolkit(config: Any) -> bool:
    """Whether it has the form of such a configuration."""
    return bool(_datasets(config))


def plan_ai_toolkit(config: Any, places: Places) -> Plan:
    """The datasets of all processes, in their order.

    Raises:
        ValueError: a setting has a wrong value, or a folder is not there or not allowed.
    """
    notes = Notes()
    folders = []
    for trigger, datasets in _datasets(config):
        for dataset in sections(datasets, "dataset", places.config, notes):
            folders.append(_folder(dataset, trigger, places))
            dataset.note_unused(_WITHOUT_COUNTERPART)
    return Plan(tool="ai-toolkit", folders=tuple(folders), notes=notes.sentences())


def _datasets(config: Any) -> list[tuple[Any, list[Any]]]:
    """The trigger word and the datasets of each process of a job, or of the part given."""
    job = config.get("config") if isinstance(config, dict) else None
    processes = job.get("process") if isinstance(job, dict) else None
    if not isinstance(processes, list):
        processes = [config] if isinstance(config, dict) else [{"datasets": config}]
    found = []
    for process in processes:
        datasets = process.get("datasets") if isinstance(process, dict) else None
        named = {"folder_path", "dataset_path"}
        if isinstance(datasets, list) and any(
            isinstance(dataset, dict) and named & dataset.keys() for dataset in datasets
        ):
            found.append((process.get("trigger_word"), datasets))
    return found


def _folder(dataset: Settings, job_trigger: Any, places: Places) -> FolderPlan:
    folder = dataset.text("dataset_path") or dataset.text("folder_path")
    require(
        bool(folder),
        f"There is no folder_path ({dataset.place}) in {places.config}. Add the folder of the "
        "pictures.",
    )
    if dataset.flag("invert_mask"):
        raise ValueError(
            f"invert_mask ({dataset.place}) in {places.config} has no counterpart: white is "
            "trained here, black is not. Invert the masks themselves and remove the setting."
        )
    flip, repeats = dataset.flag("flip_x"), dataset.count("num_repeats", 1)
    if repeats < 1:
        raise dataset.fail("num_repeats", "1 or more")
    if flip:
        dataset.note(
            "{0}: as there, the mirrored pictures come besides: the repeats double.", "flip_x"
        )
    is_regularization, is_class = dataset.flag("prior_reg"), dataset.flag("is_reg")
    masks = dataset.text("mask_path")
    references = dataset.text("control_path")
    trigger = dataset.text("trigger_word") or (job_trigger if isinstance(job_trigger, str) else "")
    return FolderPlan(
        folder=places.folder(folder),
        resolutions=_resolutions(dataset),
        repeats=repeats * (2 if flip else 1),
        pictures=PictureSettings(
            crop="random" if dataset.flag("random_crop") else "center", flip=flip
        ),
        captions=_captions(dataset, trigger="" if is_regularization or is_class else trigger),
        masks=ALPHA if dataset.flag("alpha_mask") else places.folder(masks) if masks else None,
        references=places.folder(references) if references else None,
        is_regularization=is_regularization,
        is_prior=is_class and not is_regularization,
        recursive=True,
    )


def _resolutions(dataset: Settings) -> tuple[Resolution, ...]:
    given = dataset.value("resolution")
    sides = given if isinstance(given, list) else [512 if given is None else given]
    if not sides or not all(type(side) in (int, float) for side in sides):
        raise dataset.fail("resolution", "a number of pixels or a list of them")
    in_buckets = dataset.flag("buckets", True) and not dataset.flag("square_crop")
    shape: dict[str, Any] = {"mode": "square"}
    if in_buckets:
        shape = {"mode": "preserved", "upscale": False, "max_aspect": ANY_ASPECT}
    return tuple(
        dataclasses.replace(sized(dataset, "resolution", (side, side), step=16), **shape)
        for side in sides
    )


def _captions(dataset: Settings, *, trigger: str) -> CaptionSettings:
    extension = dataset.text("caption_type") or dataset.text("caption_ext", "txt")
    shuffle = dataset.flag("shuffle_tokens")
    if dataset.count("keep_tokens"):
        dataset.note("{0}: there it only keeps tags from token_dropout_rate.", "keep_tokens")
    return CaptionSettings(
        extension=f".{extension.removeprefix('.')}",
        default=dataset.text("default_caption"),
        missing="empty",
        trigger=trigger,
        shuffle=shuffle,
        dropout=dataset.number("caption_dropout_rate"),
    )
