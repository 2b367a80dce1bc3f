"""MODELs of other kinds than FLUX, of ComfyUI's own classes."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch

SD_15: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2] * 4,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "legacy": False,
    "use_temporal_attention": False,
}
_SMALL = {
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "num_heads": 2,
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1] * 4,
}


def without_bytes(kind: Any, sizes: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    """A MODEL of a class of comfy.supported_models whose network has names and shapes only."""
    return _patcher(kind, sizes, torch.device("meta"))


def sd_15() -> comfy.model_patcher.ModelPatcher:
    """SD 1.5 in its true size, without bytes."""
    return without_bytes(comfy.supported_models.SD15, SD_15)


def small_sd_15(context_dim: int) -> comfy.model_patcher.ModelPatcher:
    """A narrow SD 1.5 with random weights that draws."""
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = SD_15 | _SMALL | {"context_dim": context_dim}
        model = _patcher(comfy.supported_models.SD15, sizes, torch.device("cpu"))
        for parameter in model.model.diffusion_model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _patcher(
    kind: Any, sizes: dict[str, Any], device: torch.device
) -> comfy.model_patcher.ModelPatcher:
    config = kind(dict(sizes))
    config.set_inference_dtype(torch.float32, None)
    network, cpu = config.get_model({}, device=device), torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(network, cpu, cpu)
