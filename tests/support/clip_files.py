"""Small CLIP models with random weights, as files and as ComfyUI's objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

SIDE = 56
"""Of the pictures that they see, in pixels."""


def clip_model(*, space: int = 64, depth: int = 3, act: str = "quick_gelu") -> CLIPModel:
    torch.manual_seed(space)
    text = {
        "hidden_size": space,
        "intermediate_size": 2 * space,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "hidden_act": act,
        "vocab_size": 49408,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "hidden_act": act,
        "image_size": SIDE,
        "patch_size": 14,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=space))
    with torch.no_grad():  # transformers' own start gives nearly the same vector to all
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.5 if "embedding" in name else 0.15)
    return model.half().float().eval()  # ComfyUI keeps the weights as float16


def tensors(model: CLIPModel, part: str) -> dict[str, Tensor]:
    """The names under which whole CLIPs and their halves are shared."""
    return {
        name: tensor.half().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(part) and "position_ids" not in name
    }


def write_text_encoder(folder: Path, model: CLIPModel) -> str:
    path = folder / "clip_l.safetensors"
    save_file(tensors(model, "text_"), path)
    return str(path)


def sizes(model: CLIPModel) -> dict[str, Any]:
    config = model.config.text_config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    return {name: getattr(config, name) for name in names}


def load_clip(model: CLIPModel, path: str) -> Any:
    """What ComfyUI's Load CLIP does; ComfyUI knows no smaller CLIP-L, so its sizes are named."""
    return comfy.sd.load_clip([path], model_options={"model_config": sizes(model)})


def load_vision(folder: Path, model: CLIPModel) -> Any:
    """ComfyUI's own class; its Load CLIP Vision only adds which of its four sizes a file has."""
    config = {**model.config.vision_config.to_dict(), "projection_dim": model.projection_dim}
    path = folder / "vision.json"
    path.write_text(json.dumps({**config, "model_type": "clip_vision_model"}), encoding="utf-8")
    vision = comfy.clip_vision.ClipVisionModel(str(path))
    vision.load_sd(tensors(model, "vis"))
    return vision


def random_pictures(number: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """[N, H, W, 3] in 0..1, smooth and in steps of 1/255 as those of files."""
    torch.manual_seed(1)
    coarse = torch.rand(number, 3, 7, 7)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).round().movedim(1, -1) / 255
