"""Files of CLIP-L and T5-XXL with random weights under the true key names, of any width and depth.

The names and shapes are those of comfyanonymous' flux_text_encoders, written out here anew, so that
a mistake in the pack's own tables cannot hide.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CLIP_L = "clip_l.safetensors"
T5XXL = "t5xxl_fp16.safetensors"
SMALL_T5 = {"width": 128, "feed_forward": 192, "depth": 2, "heads": 3}
_CLIP_VOCABULARY = 49408
_T5_VOCABULARY = 32128


def clip_shapes(*, width: int = 128, depth: int = 2) -> dict[str, tuple[int, ...]]:
    """Every tensor of CLIP-L: width 768 and depth 12."""
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (_CLIP_VOCABULARY, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for index in range(depth):
        block = f"text_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{block}.self_attn.{part}.weight"] = (width, width)
            shapes[f"{block}.self_attn.{part}.bias"] = (width,)
        for part, shape in (("fc1", (4 * width, width)), ("fc2", (width, 4 * width))):
            shapes[f"{block}.mlp.{part}.weight"] = shape
            shapes[f"{block}.mlp.{part}.bias"] = shape[:1]
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}.{part}.weight": (width,), f"{block}.{part}.bias": (width,)}
    end = "text_model.final_layer_norm"
    return shapes | {f"{end}.weight": (width,), f"{end}.bias": (width,)}


def t5_shapes(
    *, width: int = 4096, feed_forward: int = 10240, depth: int = 24, heads: int = 64
) -> dict[str, tuple[int, ...]]:
    """Every tensor of T5-XXL's encoder, whose heads are 64 wide."""
    inner = 64 * heads
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (_T5_VOCABULARY, width)}
    for index in range(depth):
        attention = f"encoder.block.{index}.layer.0"
        dense = f"encoder.block.{index}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {
            f"{attention}.SelfAttention.o.weight": (width, inner),
            f"{attention}.layer_norm.weight": (width,),
            f"{dense}.DenseReluDense.wi_0.weight": (feed_forward, width),
            f"{dense}.DenseReluDense.wi_1.weight": (feed_forward, width),
            f"{dense}.DenseReluDense.wo.weight": (width, feed_forward),
            f"{dense}.layer_norm.weight": (width,),
        }
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return shapes | {bias: (32, heads), "encoder.final_layer_norm.weight": (width,)}


def is_packed(name: str) -> bool:
    """Whether a tensor of T5 is one of the matrices that a format packs."""
    is_matrix = name.startswith("encoder.block.") and name.endswith(".weight")
    return is_matrix and "norm" not in name and "bias" not in name


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """bf16 tensors, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith(".weight"):
            tensor = 1 + 0.1 * noise
        elif "embedding" in name or name == "shared.weight":
            tensor = noise
        else:
            tensor = noise / shape[-1] ** 0.5 if len(shape) == 2 else 0.1 * noise
        tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def small_clip(seed: int = 0) -> dict[str, Tensor]:
    return random_tensors(clip_shapes(), seed)


def small_t5(seed: int = 1) -> dict[str, Tensor]:
    return random_tensors(t5_shapes(**SMALL_T5), seed)


def scaled_fp8(tensors: dict[str, Tensor], end: str = "scale_weight") -> dict[str, Tensor]:
    """As ComfyUI's t5xxl_fp8_e4m3fn_scaled.safetensors keeps T5."""
    found = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if is_packed(name):
            scale = tensor.float().abs().max() / 448
            found[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + end] = scale
        else:
            found[name] = tensor
    return found


def write_pair(folder: Path, clip: dict[str, Tensor], t5: dict[str, Tensor]) -> tuple[Path, Path]:
    """Both files, as they lie in models/text_encoders."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(clip, folder / CLIP_L)
    save_file(t5, folder / T5XXL)
    return folder / CLIP_L, folder / T5XXL


def write_folder(folder: Path, clip: dict[str, Tensor], t5: dict[str, Tensor]) -> Path:
    """The same weights as folders in diffusers' layout, which name their sizes in config.json."""
    width = clip["text_model.final_layer_norm.weight"].shape[0]
    clip_config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": 2,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
    }
    t5_config = {
        "d_model": SMALL_T5["width"],
        "d_ff": SMALL_T5["feed_forward"],
        "num_layers": SMALL_T5["depth"],
        "num_heads": SMALL_T5["heads"],
        "d_kv": 64,
        "vocab_size": _T5_VOCABULARY,
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "model_type": "t5",
    }
    parts = {"text_encoder": (clip_config, clip), "text_encoder_2": (t5_config, t5)}
    for name, (config, tensors) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, folder / name / "model.safetensors")
    return folder
