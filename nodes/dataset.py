"""Nodes from a folder of pictures to the two caches that training reads."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from comfy_api.latest import io

from ..trainers import caching
from ..trainers.buckets import MODES, STEP, Resolution
from ..trainers.caches import LatentCache, PromptCache
from ..trainers.captions import MISSING_CAPTIONS, CaptionSettings
from ..trainers.config import PROMPT_LENGTH
from ..trainers.dataset import (
    DEFAULT_CAPTIONS,
    DEFAULT_PICTURES,
    Dataset,
    PictureSettings,
    image_folder,
    picture_files,
)
from ..trainers.metadata_files import METADATA_FILES
from ..trainers.scan import ON_BAD_FILE
from ..trainers.shards import Shards
from . import host
from .encoders import cut_texts, latent_encoder, prompt_encoder
from .loader_memory import LoaderMemory
from .wires import (
    AtelierCaptionSettings,
    AtelierDataset,
    AtelierLatentCache,
    AtelierPictureSettings,
    AtelierPromptCache,
)

logger = logging.getLogger("atelier")

HOST_MIN_LENGTH = 256
"""T5 tokens that CLIP Text Encode gives at least for FLUX; longer texts give more."""


class ImageFolderDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierImageFolderDataset",
            display_name="Image Folder Dataset",
            category="Atelier/dataset",
            description="Pictures of one folder below input/, each with a text file of the same "
            "name as its caption (cat.png and cat.txt). Everything is checked before training.",
            search_aliases=["training images", "captions", "load folder"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=host.dataset_folders(),
                    tooltip="A folder below ComfyUI's input folder that holds the pictures. Its "
                    "subfolders are not read. Press R to list new folders.",
                ),
                _side("width", 512),
                _side("height", 768),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="fixed",
                    tooltip="fixed: every picture is cropped to width x height. The others have "
                    "about as many pixels: buckets: the nearest of some shapes, so that batches "
                    "fill. square: one square for all. preserved: each picture's own shape. "
                    "random: any of the shapes, drawn for each picture.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=10000,
                    tooltip="How often each picture is seen in one epoch: 1 is once, 10 is ten "
                    "times. It only changes the balance between datasets, never the caches.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="A word that will call up what is learned. It is put before every "
                    "caption that does not contain it: 'sks, a dog on a beach'.",
                ),
                host.make_input(
                    io.Combo,
                    "missing_captions",
                    options=list(MISSING_CAPTIONS),
                    default="error",
                    advanced=True,
                    tooltip="A picture without a text file: stop with an error, use its file name "
                    "(a_red_cat.png is 'a red cat'), or leave the caption empty.",
                ),
                AtelierCaptionSettings.Input(
                    "captions",
                    optional=True,
                    tooltip="Where captions come from and what is done with them, from Caption "
                    "Settings. Without it: the text files, as they are.",
                ),
                AtelierPictureSettings.Input(
                    "pictures",
                    optional=True,
                    tooltip="Crop, resampling and mirroring, from Picture Settings. Without it: "
                    "the middle of each picture.",
                ),
                host.make_input(
                    io.Combo,
                    "on_bad_file",
                    options=list(ON_BAD_FILE),
                    default=ON_BAD_FILE[0],
                    optional=True,
                    advanced=True,
                    tooltip="A file that has a picture's name and is none, or cannot be read. "
                    "stop: end with its name. skip: go on without it, and say so.",
                ),
            ],
            outputs=[
                AtelierDataset.Output(
                    display_name="dataset",
                    tooltip="The description of the pictures, for Cache Latents and Encode "
                    "Prompts. It holds no pixels.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        if folder is None:  # a linked input is not known yet
            return True
        try:
            picture_files(host.dataset_folder(folder))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_: Any) -> list[tuple[str, int, int]]:
        pictures = picture_files(host.dataset_folder(folder))
        captions = [picture.with_suffix(".txt") for picture in pictures]
        tables = [pictures[0].with_name(name) for name in METADATA_FILES]
        files = [*pictures, *captions, *tables]
        stats = [(path, path.stat()) for path in files if path.is_file()]
        return [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    @classmethod
    def execute(
        cls,
        folder: str,
        width: int,
        height: int,
        mode: str,
        repeats: int,
        trigger: str,
        missing_captions: str,
        captions: CaptionSettings = DEFAULT_CAPTIONS,
        pictures: PictureSettings = DEFAULT_PICTURES,
        on_bad_file: str = ON_BAD_FILE[0],
    ) -> io.NodeOutput:
        dataset = image_folder(
            host.dataset_folder(folder),
            resolution=Resolution(width=width, height=height, mode=mode),
            repeats=repeats,
            captions=dataclasses.replace(captions, trigger=trigger, missing=missing_captions),
            pictures=pictures,
            on_bad_file=on_bad_file,
            index_folder=host.cache_folder("files"),
            on_progress=host.Progress().update,
        )
        count = f"Pictures: {len(dataset.records)}, seen per epoch: {dataset.num_samples}."
        return io.NodeOutput(dataset, ui=_texts(cls.hidden.unique_id, count, *dataset.warnings))


class CacheLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierCacheLatents",
            display_name="Cache Latents",
            category="Atelier/dataset",
            description="Encodes the pictures of a dataset with the VAE, once, and keeps the "
            "result on disk. Only new or changed pictures are encoded; when there are none, the "
            "VAE is not even loaded. A cancelled run goes on where it stopped.",
            search_aliases=["vae encode dataset"],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                AtelierDataset.Input("dataset", tooltip="The pictures to encode."),
                io.Vae.Input(
                    "vae",
                    lazy=True,
                    tooltip="The VAE of the model that is trained, for FLUX ae.safetensors.",
                ),
                host.make_input(
                    io.Int,
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Pictures encoded at once. More is faster on a large GPU and needs "
                    "more memory; the training does not depend on it.",
                ),
            ],
            outputs=[
                AtelierLatentCache.Output(
                    display_name="latents",
                    tooltip="The encoded pictures on disk, for Train LoRA.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return Shards(host.cache_folder("latents")).generation()

    @classmethod
    def check_lazy_status(cls, dataset: Dataset, **_: Any) -> list[str]:
        folder = host.cache_folder("latents")
        encoder_id = LoaderMemory(cls.hidden, "vae", folder).recall()
        if not encoder_id:
            return ["vae"]
        wanted = caching.latent_cache(dataset, encoder_id, folder)
        return ["vae"] if caching.num_missing(wanted) else []

    @classmethod
    def execute(cls, dataset: Dataset, batch_size: int, vae: Any = None) -> io.NodeOutput:
        folder = host.cache_folder("latents")
        memory = LoaderMemory(cls.hidden, "vae", folder)
        encoder_id = memory.recall()
        encode = _not_loaded
        if vae is not None or not encoder_id:
            encode, encoder_id = latent_encoder(vae)
        cache = caching.cache_latents(
            dataset,
            encode,
            encoder_id,
            folder,
            batch_size=batch_size,
            on_progress=host.Progress().update,
        )
        memory.remember(encoder_id)
        done = f"Pictures cached: {len(cache.entries)}, {_mib(cache)} MiB on disk."
        return io.NodeOutput(cache, ui=_texts(cls.hidden.unique_id, done))


class EncodePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierEncodePrompts",
            display_name="Encode Prompts",
            category="Atelier/dataset",
            description="Encodes the captions of a dataset with both text encoders, once, and "
            "keeps the result on disk. Captions are taken literally: brackets are no weights. "
            "Only new captions are encoded; when there are none, the encoders are not loaded.",
            search_aliases=["cache captions", "text embeddings"],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            inputs=[
                AtelierDataset.Input("dataset", tooltip="The captions to encode."),
                io.Clip.Input(
                    "clip",
                    lazy=True,
                    tooltip="FLUX's two text encoders, from Load Quantized Text Encoders, or from "
                    "DualCLIPLoader with type flux.",
                ),
                io.Int.Input(
                    "length",
                    default=PROMPT_LENGTH,
                    min=8,
                    max=512,
                    tooltip="T5 tokens of every caption, padded or cut; a word is one or two. 77 "
                    "is fast and small, 512 is the most that FLUX.1-dev knows (schnell: 256).",
                ),
            ],
            outputs=[
                AtelierPromptCache.Output(
                    display_name="prompts",
                    tooltip="The encoded captions on disk, for Train LoRA.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        return Shards(host.cache_folder("prompts")).generation()

    @classmethod
    def check_lazy_status(cls, dataset: Dataset, length: int, **_: Any) -> list[str]:
        folder = host.cache_folder("prompts")
        encoder_id = LoaderMemory(cls.hidden, "clip", folder).recall()
        if not encoder_id:
            return ["clip"]
        wanted = caching.prompt_cache(dataset.texts, encoder_id, length, folder)
        return ["clip"] if caching.num_missing(wanted) else []

    @classmethod
    def execute(cls, dataset: Dataset, length: int, clip: Any = None) -> io.NodeOutput:
        folder = host.cache_folder("prompts")
        memory = LoaderMemory(cls.hidden, "clip", folder)
        encoder_id = memory.recall()
        encode = _not_loaded
        if clip is not None or not encoder_id:
            encode, encoder_id = prompt_encoder(clip, length)
        cache = caching.cache_prompts(
            dataset.texts, encode, encoder_id, length, folder, on_progress=host.Progress().update
        )
        memory.remember(encoder_id)
        warnings = _length_warnings(dataset.texts, length)
        done = f"Captions cached: {len(cache.entries)}, {_mib(cache)} MiB on disk."
        return io.NodeOutput(cache, ui=_texts(cls.hidden.unique_id, done, *warnings))


def _side(name: str, default: int) -> Any:
    return io.Int.Input(
        name,
        default=default,
        min=64,
        max=8192,
        step=STEP,
        tooltip=f"The {name} in pixels at which pictures are trained, a multiple of {STEP}. Time "
        "and memory grow with width x height.",
    )


def _not_loaded(_: Any) -> Any:
    raise ValueError("The cache changed while this ran. Queue the graph again.")


def _mib(cache: LatentCache | PromptCache) -> str:
    return f"{cache.total_bytes / 2**20:.1f}"


def _length_warnings(texts: tuple[str, ...], length: int) -> list[str]:
    warnings = []
    if length != HOST_MIN_LENGTH:
        warnings.append(
            f"Captions are encoded to {length} T5 tokens; CLIP Text Encode will use "
            f"{HOST_MIN_LENGTH} or more. Set length to {HOST_MIN_LENGTH} to train on the same."
        )
    cut = cut_texts(texts, length)
    if cut:
        warnings.append(
            f"Captions longer than {length} tokens, whose end is cut off: {len(cut)}, for example "
            f"{cut[0][:60]!r}."
        )
    return warnings


def _texts(node_id: str, message: str, *warnings: str) -> dict[str, list[str]]:
    """Text for the node's face and the history; warnings go to the log as well."""
    for warning in warnings:
        logger.warning(warning)
    host.show_text("\n".join([message, *warnings]), node_id)
    return {"text": [message, *warnings]}
