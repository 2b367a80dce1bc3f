"""The loaders of the base model and of its text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..trainers.config import COMPUTE_DTYPES, STREAMING
from ..trainers.devices import compute_dtype as resolve_dtype
from ..trainers.devices import require_format_on
from ..trainers.formats import FORMATS
from ..trainers.hub import fetch_flux, require_hub_id
from ..trainers.load import LoadedFlux, inspect_flux, load_flux
from ..trainers.packed_copy import PackedCopies
from ..trainers.preflight import choose_format, describe_choice
from ..trainers.tensor_files import model_files
from ..trainers.text_encoders import load_text_encoders
from . import folders, host
from .encoders import build_clip, build_vae, checkpoint_parts
from .inputs import QUANTIZE_ON, quantize_device, shared_input
from .native import build_model
from .native_clip import build_text_encoders

NANO = "nano (built in)"
AUTO = "auto"
_FileState = tuple[str, int, int]
"""Path, size and time of change."""
_NANO_FOLDER = Path(__file__).parent.parent / "assets" / "nano"
_NO_CLIP = (
    "This model file holds no text encoders. Add the node Load Quantized Text Encoders, or "
    "DualCLIPLoader with type flux, and connect its CLIP instead."
)
_NO_VAE = (
    "This model file holds no autoencoder. Add the node Load VAE with ae.safetensors and connect "
    "its VAE instead."
)


class LoadQuantizedFlux(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierLoadQuantizedFlux",
            display_name="Load Quantized FLUX",
            category="Atelier/loaders",
            description="Loads a FLUX.1 model into few bits. The MODEL works with every node of "
            "ComfyUI, and Train LoRA trains on the same copy in memory.",
            search_aliases=["nf4", "bitsandbytes", "flux loader", "quantize"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    tooltip="A FLUX.1 file of models/diffusion_models or models/checkpoints (bf16, "
                    "fp16, fp8 or packed by bitsandbytes), a folder of models/diffusers, or the "
                    "small model that comes with the pack and needs no download.",
                ),
                io.Combo.Input(
                    "format",
                    options=[*FORMATS, AUTO],
                    default="nf4",
                    tooltip="How the weights are kept; FLUX.1's take 24 GB as bf16. nf4: 4 bits, "
                    "the usual choice. int4: 4 bits with a smaller error than nf4, and "
                    "needs no bitsandbytes. fp4: 4 bits with a larger error. int8, fp8: "
                    "half of bf16; fp8 has a third of nf4's error, int8 less. int2: 3 bits "
                    "with three times nf4's error, where nothing else fits. bf16: as in "
                    "the file. auto: bf16, int8 or nf4 (int4 without bitsandbytes), the first that "
                    "fits the free memory.",
                ),
                host.make_input(
                    io.Combo,
                    "compute_dtype",
                    options=list(COMPUTE_DTYPES),
                    default="auto",
                    advanced=True,
                    tooltip="Type of the arithmetic when pictures are made. auto: bf16 where the "
                    "device is fast in it, else fp16 or fp32. fp32 is exact and slow.",
                ),
                shared_input("keep_copy", optional=True, advanced=True),
                shared_input("quantize_on", optional=True, advanced=True),
                host.make_input(
                    io.Float,
                    "reserve_gb",
                    default=2.0,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    optional=True,
                    advanced=True,
                    tooltip="Memory of the card, in GB, that format auto leaves free for the work "
                    "itself. 2 is enough for pictures of FLUX.1; for training, connect Estimate "
                    "Memory.",
                ),
                host.make_input(
                    io.Combo,
                    "block_streaming",
                    options=list(STREAMING),
                    default=STREAMING[0],
                    optional=True,
                    advanced=True,
                    tooltip="Where blocks of the model wait until they compute, in training and in "
                    "sampling. auto: in RAM those that do not fit on the GPU. off: none. ram: all "
                    "in RAM, which needs the least memory of the GPU. disk: all in the quantized "
                    "copy in output/atelier/packed, which needs the least RAM too.",
                ),
                host.make_input(
                    io.String,
                    "hub_id",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A Hugging Face repository that takes the place of model, such as "
                    "black-forest-labs/FLUX.1-dev. It is downloaded once, into the hub's own "
                    "cache. When this is empty, nothing is downloaded.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Model.Output(tooltip="The model, for samplers, LoRA loaders and Train LoRA."),
                io.Clip.Output(tooltip="The text encoders, if the model comes with them."),
                io.Vae.Output(tooltip="The autoencoder, if the model comes with it."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None, hub_id: str | None = "") -> bool | str:
        if model is None or hub_id is None:  # a linked input is not known yet
            return True
        try:
            if hub_id:
                require_hub_id(hub_id)
            else:
                model_files(model_path(model))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model: str, hub_id: str | None = "", **_: Any) -> list[_FileState]:
        # What is in the hub's cache stays: only its id tells one model from another.
        return [] if hub_id else _file_states(model_files(model_path(model)))

    @classmethod
    def execute(
        cls,
        model: str,
        format: str,
        compute_dtype: str,
        reserve_gb: float = 2.0,
        hub_id: str = "",
        **settings: Any,
    ) -> io.NodeOutput:
        require_format_on(format, host.compute_device())
        progress = host.Progress()
        path = fetch_flux(hub_id, progress.update) if hub_id else model_path(model)
        if format == AUTO:
            format = _best_format(path, reserve_gb, cls.hidden.unique_id)
        loaded = _load(path, format, progress, **settings)
        dtype = resolve_dtype(compute_dtype, host.compute_device())
        return io.NodeOutput(
            build_model(loaded, dtype), *_clip_and_vae(path, "" if hub_id else model)
        )


def _load(
    path: Path,
    format: str,
    progress: host.Progress,
    *,
    keep_copy: bool = True,
    quantize_on: str = QUANTIZE_ON[0],
    block_streaming: str = STREAMING[0],
) -> LoadedFlux:
    return load_flux(
        path,
        format=format,
        device=host.offload_device(),
        quantize_on=quantize_device(quantize_on),
        copies=_copies(keep_copy, block_streaming),
        streaming=block_streaming,
        on_progress=progress.update,
    )


def model_names() -> list[str]:
    """What can be chosen; files of models/diffusion_models by their plain names, as core does."""
    checkpoints = [f"checkpoints/{name}" for name in folders.model_names("checkpoints")]
    diffusers = [f"diffusers/{name}" for name in folders.diffusers_folders()]
    return [NANO, *folders.model_names("diffusion_models"), *checkpoints, *diffusers]


def model_path(name: str) -> Path:
    """The file or folder behind one of `model_names`.

    Raises:
        ValueError: if it is gone.
    """
    if name == NANO:
        return _NANO_FOLDER / "nano-flux.safetensors"
    kind, _, rest = name.partition("/")
    if kind == "diffusers":
        path = folders.diffusers_folders().get(rest)
    elif kind == "checkpoints":
        path = folders.model_file("checkpoints", rest)
    else:
        path = folders.model_file("diffusion_models", name)
    if path is None:
        raise ValueError(f"The model '{name}' is not there any more. Press R and choose another.")
    return path


def _best_format(path: Path, reserve_gb: float, node_id: str) -> str:
    file, free_gb = inspect_flux(path), host.free_memory() / 1e9
    free_bytes = int((free_gb - reserve_gb) * 1e9)
    format = choose_format(file, free_bytes, host.compute_device())
    text = describe_choice(file, format, free_gb=free_gb, reserve_gb=reserve_gb)
    host.show_text(text, node_id)
    return format


class LoadQuantizedTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.model_names("text_encoders")
        return host.schema(
            node_id="AtelierLoadQuantizedTextEncoders",
            display_name="Load Quantized Text Encoders",
            category="Atelier/loaders",
            description="Loads FLUX's text encoders, CLIP-L and T5-XXL, with T5-XXL in few bits: "
            "3 GB of memory instead of 10. The CLIP works with every node of ComfyUI.",
            search_aliases=["dual clip loader", "t5xxl", "clip loader", "nf4"],
            inputs=[
                io.Combo.Input(
                    "clip_l",
                    options=names,
                    tooltip="The file of CLIP-L in models/text_encoders, such as "
                    "clip_l.safetensors. It stays bf16: it takes only 0.25 GB.",
                ),
                io.Combo.Input(
                    "t5xxl",
                    options=names,
                    tooltip="The file of T5-XXL in models/text_encoders, such as "
                    "t5xxl_fp16.safetensors or t5xxl_fp8_e4m3fn_scaled.safetensors. It does not "
                    "matter which of the two inputs names which file.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    default="nf4",
                    tooltip="How T5-XXL's weights are kept; in all they take 9.8 GB as bf16. "
                    "nf4, fp4: 3.0 GB. int4: 3.1 GB, with a smaller error than nf4, and needs no "
                    "bitsandbytes. int8, fp8: 5.1 GB. int2: 2.2 GB, with three times nf4's error. "
                    "bf16: as in the file.",
                ),
                shared_input("keep_copy", optional=True, advanced=True),
                shared_input("quantize_on", optional=True, advanced=True),
            ],
            outputs=[io.Clip.Output(tooltip="For CLIP Text Encode and Encode Prompts.")],
        )

    @classmethod
    def validate_inputs(cls, clip_l: str | None, t5xxl: str | None) -> bool | str:
        try:
            for name in (clip_l, t5xxl):
                if name is not None:  # a linked input is not known yet
                    model_files(_text_encoder_path(name))
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, clip_l: str, t5xxl: str, **_: Any) -> list[_FileState]:
        return _file_states([_text_encoder_path(clip_l), _text_encoder_path(t5xxl)])

    @classmethod
    def execute(
        cls,
        clip_l: str,
        t5xxl: str,
        format: str,
        keep_copy: bool = True,
        quantize_on: str = QUANTIZE_ON[0],
    ) -> io.NodeOutput:
        loaded = load_text_encoders(
            _text_encoder_path(clip_l),
            _text_encoder_path(t5xxl),
            format=format,
            quantize_on=quantize_device(quantize_on),
            copies=_copies(keep_copy),
            on_progress=host.Progress().update,
        )
        return io.NodeOutput(build_text_encoders(loaded, folders.embedding_folders()))


def _text_encoder_path(name: str) -> Path:
    path = folders.model_file("text_encoders", name)
    if path is None:
        raise ValueError(
            f"The text encoder '{name}' is not there any more. Press R and choose another."
        )
    return path


def _file_states(files: list[Path]) -> list[_FileState]:
    stats = [(str(file), file.stat()) for file in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def _copies(keep_copy: bool, block_streaming: str = "off") -> PackedCopies | None:
    if not keep_copy and block_streaming != "disk":
        return None
    return PackedCopies(folders.atelier_output() / "packed", writes=keep_copy)


def _clip_and_vae(path: Path, name: str) -> tuple[Any, Any]:
    """What the model comes with, or a stop that names the node to add."""
    if name.startswith("checkpoints/"):
        clip, vae = checkpoint_parts(path)
        return clip or host.blocked_output(_NO_CLIP), vae or host.blocked_output(_NO_VAE)
    folder = _NANO_FOLDER if name == NANO else path
    has_clip = (folder / "text_encoder").is_dir() and (folder / "text_encoder_2").is_dir()
    return (
        build_clip(folder) if has_clip else host.blocked_output(_NO_CLIP),
        build_vae(folder) if (folder / "vae").is_dir() else host.blocked_output(_NO_VAE),
    )
