"""Nodes that turn a dataset into the two caches that training reads."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainers import caching
from ..trainers.caches import LatentCache, PromptCache
from ..trainers.config import PROMPT_LENGTH
from ..trainers.dataset import Dataset
from ..trainers.shards import Shards
from . import host
from .encoders import cut_texts, latent_encoder, prompt_encoder
from .loader_memory import LoaderMemory
from .wires import AtelierDataset, AtelierLatentCache, AtelierPromptCache

HOST_MIN_LENGTH = 256
"""T5 tokens that CLIP Text Encode gives at least for FLUX; longer texts give more."""


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
        return io.NodeOutput(cache, ui=host.report(cls.hidden.unique_id, done))


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
        return io.NodeOutput(cache, ui=host.report(cls.hidden.unique_id, done, *warnings))


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
