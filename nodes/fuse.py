"""LoRAs made part of a model: packed anew in memory, or written to a file."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..trainers.devices import require_format_on
from ..trainers.formats import FORMATS
from ..trainers.fuse import Origin, pack_flux, require_memory
from ..trainers.load import LoadedFlux
from ..trainers.model_file import FILE_DTYPES, save_flux
from . import folders, host
from .inputs import QUANTIZE_ON, quantize_device, shared_input
from .native_fuse import make_room, model_of, origin_of_model, with_patches_of

AS_THE_MODEL = "as the model"
_FROM_PACKED = (
    "The file behind this MODEL is not known, so what it computes with was taken: numbers that are "
    "rounded already."
)
_LEFT_OUT = (
    "A LoRA that acts in a part of the sampling cannot be in the weights: it stays on the MODEL, "
    "and is in no file."
)


class FuseLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierFuseLoRA",
            display_name="Fuse LoRA",
            category="Atelier/lora",
            description="Makes the LoRAs on a FLUX.1 MODEL a part of its weights. The model's file "
            "is read again, so that the weights are quantized once, with the LoRAs in them.",
            search_aliases=["merge lora", "bake lora", "requantize", "fuse_lora"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A FLUX.1 MODEL with LoRAs on it, of Apply LoRA or any other loader.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Times the strength of every LoRA.",
                ),
                io.Combo.Input(
                    "format",
                    options=[AS_THE_MODEL, *FORMATS],
                    default=AS_THE_MODEL,
                    tooltip="How the new weights are kept, as in Load Quantized FLUX. In 4 bits a "
                    "LoRA is rounded with the weights: its help page has the numbers.",
                ),
                shared_input("quantize_on", optional=True, advanced=True),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output(tooltip="A new MODEL with the LoRAs in its weights.")],
        )

    @classmethod
    def execute(
        cls, model: Any, scale: float, format: str, quantize_on: str = QUANTIZE_ON[0]
    ) -> io.NodeOutput:
        _require_loras(model, scale)
        given = origin_of_model(model)
        fused = _fused(model, scale, format, quantize_device(quantize_on), given)
        text = f"Fused into {len(model.patches)} tensors, now in {fused.format}."
        ui = host.report(cls.hidden.unique_id, text, *_warnings(model, given))
        return io.NodeOutput(model_of(fused, model), ui=ui)


def _fused(
    model: Any, scale: float, format: str, device: torch.device, given: Origin
) -> LoadedFlux:
    """The weights that `given` has, with the LoRAs on the MODEL in them, packed on `device`."""
    origin = with_patches_of(model, given, scale)
    format = given.format if format == AS_THE_MODEL else format
    require_format_on(format, host.compute_device())
    kept_on = host.offload_device()
    is_host = kept_on.type == "cpu"
    require_memory(origin, format, host.free_system_memory() if is_host else host.free_memory())
    make_room(origin, device)
    return pack_flux(
        origin,
        format=format,
        device=kept_on,
        quantize_on=device,
        streaming=_streaming(model),
        on_progress=host.Progress().update,
    )


def _require_loras(model: Any, scale: float) -> None:
    if not model.patches and any(model.hook_patches.values()):
        raise ValueError(
            "Fuse LoRA has nothing to fuse: the LoRA on its MODEL acts in a part of the sampling, "
            "and weights act in all of it. Set its start_percent to 0 and its end_percent to 1."
        )
    if not (model.patches and scale):
        raise ValueError(
            "Fuse LoRA has nothing to fuse: its MODEL carries no LoRA, or scale is 0. Put a LoRA "
            "on the MODEL with Apply LoRA, and set scale to 1."
        )


class SaveFusedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="AtelierSaveFusedModel",
            display_name="Save Fused Model",
            category="Atelier/lora",
            description="Writes a FLUX.1 MODEL with its LoRAs as one file, under the names of the "
            "original files, which ComfyUI and diffusers load. It holds the numbers of the model's "
            "file with the LoRAs added, not the quantized ones.",
            search_aliases=["export model", "save checkpoint", "merge lora", "bake lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="A FLUX.1 MODEL, with LoRAs on it or fused into it."
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/flux_fused",
                    tooltip="Where in the output folder, and how the name begins; a number "
                    "follows. What lies in diffusion_models is in the lists of the model loaders.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=[*FILE_DTYPES],
                    default="bf16",
                    tooltip="bf16: as the original files, 24 GB for FLUX.1. fp16: as large. fp8 "
                    "(e4m3, without scales): half, and less precise than the format fp8 of Load "
                    "Quantized FLUX.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output(display_name="file", tooltip="Path of the file.")],
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, dtype: str) -> io.NodeOutput:
        given, device = origin_of_model(model), host.compute_device()
        origin = with_patches_of(model, given)
        path = folders.numbered_file(filename_prefix, ".safetensors")
        make_room(origin, device)
        save_flux(
            path,
            origin,
            dtype=dtype,
            title=path.stem,
            device=device,
            on_progress=host.Progress().update,
        )
        text = f"Saved {path.name}: {path.stat().st_size / 1e9:.3g} GB."
        ui = host.report(cls.hidden.unique_id, text, *_warnings(model, given))
        return io.NodeOutput(str(path), ui=ui)


def _streaming(model: Any) -> str:
    """That of the model; what would come from its copy on disk comes from RAM, as there is none."""
    loaded = getattr(model.model, "atelier", None)
    streaming = loaded.store.streaming if loaded else "auto"
    return "ram" if streaming == "disk" else streaming


def _warnings(model: Any, given: Origin) -> list[str]:
    is_rounded = given.source is None and given.format != "bf16"
    has_more = any(model.hook_patches.values())
    return [*[_FROM_PACKED] * is_rounded, *[_LEFT_OUT] * has_more]
