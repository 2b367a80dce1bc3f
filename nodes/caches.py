"""Nodes that turn a dataset into the two caches that training reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..trainers import caching
from ..trainers.caches import LatentCache, PromptCache
from ..trainers.caching import LATENTS, LatentSettings
from ..trainers.config import PROMPT_LENGTH
from ..trainers.dataset import Dataset
from ..trainers.preservation import with_class_captions
from ..trainers.preservation_settings import PreservationSettings
from ..trainers.shards import Shards
from . import folders, host
from .encoders import cut_sentences, latent_encoder, prompt_encoder, text_masks
from .loader_memory import LoaderMemory
from .wires import (
    AtelierDataset,
    AtelierLatentCache,
    AtelierPreservationSettings,
    AtelierPromptCache,
)

HOST_MIN_LENGTH = 256
"""T5 tokens that CLIP Text Encode gives at least for FLUX; longer texts give more."""
LIMIT_GB = 50.0
NOTHING_KEPT = PreservationSettings()
TILES = {"off": 0, "512": 512, "1024": 1024, "2048": 2048}
"""Choice to the side in pixels."""


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
                host.make_input(
                    io.Combo,
                    "latents",
                    options=list(LATENTS),
                    default=LATENTS[0],
                    optional=True,
                    advanced=True,
                    tooltip="distribution: mean and deviation, from which every step draws anew. "
                    "one sample: a single draw of it, half the size on disk.",
                ),
                host.make_input(
                    io.Combo,
                    "tile",
                    options=list(TILES),
                    default="off",
                    optional=True,
                    advanced=True,
                    tooltip="Pictures with a longer side than this, in pixels, are encoded in "
                    "overlapping tiles of this side. It needs less memory and gives slightly other "
                    "numbers: only for pictures that do not fit otherwise.",
                ),
                _limit_input(
                    tooltip="Fewer or smaller sizes, or latents as one sample, need less."
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
        return Shards(folders.cache_folder("latents")).generation()

    @classmethod
    def check_lazy_status(
        cls, dataset: Dataset, latents: str = LATENTS[0], tile: str = "off", **_: Any
    ) -> list[str]:
        folder = folders.cache_folder("latents")
        encoder_id = LoaderMemory(cls.hidden, "vae", folder).recall()
        if not encoder_id:
            return ["vae"]
        settings = LatentSettings(kept=latents, tile=TILES[tile])
        wanted = caching.latent_cache(dataset, encoder_id, folder, settings)
        return ["vae"] if caching.num_missing(wanted) else []

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        batch_size: int,
        vae: Any = None,
        latents: str = LATENTS[0],
        tile: str = "off",
        limit_gb: float = LIMIT_GB,
    ) -> io.NodeOutput:
        folder = folders.cache_folder("latents")
        memory = LoaderMemory(cls.hidden, "vae", folder)
        encoder_id = memory.recall()
        encode = _not_loaded
        if vae is not None or not encoder_id:
            encode, encoder_id = latent_encoder(vae, TILES[tile])
        left_out: list[str] = []
        with _enough_memory(
            "The GPU's memory is not enough to encode these pictures. Set batch_size to 1, or tile "
            "to 1024 or 512."
        ):
            cache = caching.cache_latents(
                dataset,
                encode,
                encoder_id,
                folder,
                settings=LatentSettings(kept=latents, tile=TILES[tile]),
                batch_size=batch_size,
                limit_bytes=int(limit_gb * 1e9),
                on_progress=host.Progress().update,
                on_skip=left_out.append,
            )
        memory.remember(encoder_id)
        done = f"Pictures cached: {len(cache.entries)}, {_mib(cache)} MiB on disk."
        return io.NodeOutput(cache, ui=host.report(cls.hidden.unique_id, done, *left_out))


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
                host.make_input(
                    io.Int,
                    "batch_size",
                    default=1,
                    min=1,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Captions encoded at once. More is faster on a GPU and needs more "
                    "memory; the training does not depend on it.",
                ),
                _limit_input(tooltip="Fewer caption variants or a shorter length need less."),
                host.make_input(
                    AtelierPreservationSettings,
                    "preservation_settings",
                    optional=True,
                    tooltip="If Preservation Settings has a class word: every caption with the "
                    "trigger is encoded a second time, with the class word in its place.",
                ),
                host.make_input(
                    io.Boolean,
                    "mask_padding",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Hide the padding after each caption from the model while it trains. "
                    "For LibreFLUX, which was made that way; other FLUX.1 see the padding. "
                    "Embeddings stay as they are cached: only the masks come besides. On some "
                    "cards a step is a little slower.",
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
        return Shards(folders.cache_folder("prompts")).generation()

    @classmethod
    def check_lazy_status(
        cls,
        dataset: Dataset,
        length: int,
        preservation_settings: PreservationSettings = NOTHING_KEPT,
        mask_padding: bool = False,
        **_: Any,
    ) -> list[str]:
        folder = folders.cache_folder("prompts")
        encoder_id = LoaderMemory(cls.hidden, "clip", folder).recall()
        if not encoder_id:
            return ["clip"]
        texts = with_class_captions(preservation_settings, dataset.texts)
        wanted = caching.prompt_cache(texts, encoder_id, length, folder, is_masked=mask_padding)
        return ["clip"] if caching.num_missing(wanted) else []

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        length: int,
        clip: Any = None,
        batch_size: int = 1,
        limit_gb: float = LIMIT_GB,
        preservation_settings: PreservationSettings = NOTHING_KEPT,
        mask_padding: bool = False,
    ) -> io.NodeOutput:
        texts = with_class_captions(preservation_settings, dataset.texts)
        folder = folders.cache_folder("prompts")
        memory = LoaderMemory(cls.hidden, "clip", folder)
        encoder_id = memory.recall()
        encode = _not_loaded
        if clip is not None or not encoder_id:
            encode, encoder_id = prompt_encoder(clip, length)
        with _enough_memory(
            "The GPU's memory is not enough to encode these captions. Set batch_size to 1, or load "
            "the text encoders in a smaller format."
        ):
            cache = caching.cache_prompts(
                texts,
                encode,
                encoder_id,
                length,
                folder,
                mask=partial(text_masks, length=length) if mask_padding else None,
                batch_size=batch_size,
                limit_bytes=int(limit_gb * 1e9),
                on_progress=host.Progress().update,
            )
        memory.remember(encoder_id)
        warnings = _length_warnings(texts, length)
        lines = [f"Captions cached: {len(cache.entries)}, {_mib(cache)} MiB on disk."]
        if preservation_settings.keeps_class:
            lines.append(f"Captions with the class word: {len(texts) - len(dataset.texts)}.")
        shown = host.report(cls.hidden.unique_id, "\n".join(lines), *warnings)
        return io.NodeOutput(cache, ui=shown)


def _limit_input(*, tooltip: str) -> Any:
    return host.make_input(
        io.Float,
        "limit_gb",
        default=LIMIT_GB,
        min=0.1,
        max=100_000.0,
        step=1.0,
        optional=True,
        advanced=True,
        tooltip="Gigabytes that one run of this node may add to the cache. What it will take is "
        f"known before it is written; above this it stops. {tooltip}",
    )


@contextmanager
def _enough_memory(sentence: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not host.is_out_of_memory(error):
            raise
        host.free_device_memory()
        raise ValueError(sentence) from error


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
    return [*warnings, *cut_sentences(texts, length)]
