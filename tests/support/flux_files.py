"""FLUX.1 files of random weights under the true key names, of any width and depth.

The names and shapes are those of black-forest-labs' flux1-dev.safetensors, written out here anew,
so that a mistake in the pack's own tables cannot hide.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def flux_shapes(
    *,
    width: int = 256,
    depth: int = 1,
    depth_single: int = 1,
    context: int = 128,
    vector: int = 64,
    channels: int = 64,
    guidance: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape. FLUX.1-dev: width 3072, depth 19 + 38, context 4096, 768."""
    linears = {
        "img_in": (width, channels),
        "txt_in": (width, context),
        "time_in.in_layer": (width, 256),
        "time_in.out_layer": (width, width),
        "vector_in.in_layer": (width, vector),
        "vector_in.out_layer": (width, width),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    if guidance:
        linears |= {"guidance_in.in_layer": (width, 256), "guidance_in.out_layer": (width, width)}
    scales = []
    for index in range(depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linears |= {
                f"{block}_mod.lin": (6 * width, width),
                f"{block}_attn.qkv": (3 * width, width),
                f"{block}_attn.proj": (width, width),
                f"{block}_mlp.0": (4 * width, width),
                f"{block}_mlp.2": (width, 4 * width),
            }
            scales += [f"{block}_attn.norm.{part}_norm.scale" for part in ("query", "key")]
    for index in range(depth_single):
        block = f"single_blocks.{index}"
        linears |= {
            f"{block}.modulation.lin": (3 * width, width),
            f"{block}.linear1": (7 * width, width),
            f"{block}.linear2": (width, 5 * width),
        }
        scales += [f"{block}.norm.{part}_norm.scale" for part in ("query", "key")]
    shapes: dict[str, tuple[int, ...]] = {name: (128,) for name in scales}
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def flux_tensors(seed: int = 0, **sizes: int | bool) -> dict[str, Tensor]:
    """Random bf16 tensors, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in flux_shapes(**sizes).items():  # pyright: ignore[reportArgumentType]
        noise = torch.randn(shape, generator=generator)
        if name.endswith(".scale"):
            tensor = 1 + 0.1 * noise
        else:
            tensor = noise / shape[-1] ** 0.5 if len(shape) == 2 else 0.1 * noise
        tensors[name] = tensor.to(torch.bfloat16)
    return tensors


def write_flux(path: Path, *, prefix: str = "", seed: int = 0, **sizes: int | bool) -> Path:
    """Write such a file; returns its path."""
    tensors = {f"{prefix}{name}": tensor for name, tensor in flux_tensors(seed, **sizes).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
