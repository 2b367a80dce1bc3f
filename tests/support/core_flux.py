"""The same random FLUX as ComfyUI's own MODEL: dense weights, core operations, core patcher.

What it computes is what the pack's MODEL is compared with.
"""

from __future__ import annotations

import dataclasses

import comfy.controlnet
import comfy.model_detection
import comfy.model_patcher
import comfy.ops
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from comfy.ldm.flux.model import FluxParams
from dense import num_blocks, stored_tensors
from flux_files import flux_tensors
from torch import Tensor


def core_model(format: str, seed: int = 0, **sizes: int | bool) -> comfy.model_patcher.ModelPatcher:
    """`flux_files.flux_tensors(seed, …)` as a store in `format` holds them, in float32."""
    return core_model_of(stored_tensors(format, seed=seed, **sizes))


def core_model_of(tensors: dict[str, Tensor]) -> comfy.model_patcher.ModelPatcher:
    """A FLUX of any size from float32 tensors under the original names, of the class that the core
    finds for it."""
    with torch.inference_mode(False):
        config = comfy.model_detection.model_config_from_unet_config(_sizes(tensors))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu"))
        model.load_model_weights(dict(tensors))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def core_controlnet() -> comfy.controlnet.ControlNet:
    """A random ControlNet of XLabs' kind for it, as ComfyUI's loader makes one of a file."""
    cpu = torch.device("cpu")
    generator = torch.Generator().manual_seed(9)
    with torch.inference_mode(False), torch.no_grad():
        operations = comfy.ops.disable_weight_init
        sizes = _sizes(flux_tensors())
        network = ControlNetFlux(dtype=torch.float32, device=cpu, operations=operations, **sizes)
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    conditions = ["y", "guidance"]
    return comfy.controlnet.ControlNet(network, load_device=cpu, extra_conds=conditions)


def _sizes(tensors: dict[str, Tensor]) -> dict:
    width = tensors["img_in.weight"].shape[0]
    sizes = {
        "image_model": "flux",
        "in_channels": tensors["img_in.weight"].shape[1] // 4,
        "out_channels": 16,
        "vec_in_dim": tensors["vector_in.in_layer.weight"].shape[1],
        "context_in_dim": tensors["txt_in.weight"].shape[1],
        "hidden_size": width,
        "mlp_ratio": 4.0,
        "num_heads": width // 128,
        "depth": num_blocks(tensors, "double_blocks."),
        "depth_single_blocks": num_blocks(tensors, "single_blocks."),
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": "guidance_in.in_layer.weight" in tensors,
    }
    newer = {"txt_ids_dims": []}  # since FLUX.2
    known = {field.name for field in dataclasses.fields(FluxParams)}
    return sizes | {name: value for name, value in newer.items() if name in known}
