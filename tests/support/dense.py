"""What the tests compare with: plain diffusers networks, and bitsandbytes' own quantization.

Nothing here computes with the pack: names are turned by diffusers' own converter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from bitsandbytes import functional
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from flux_files import flux_tensors
from torch import Tensor


def _nf4_round_trip(matrix: Tensor) -> Tensor:
    data, state = functional.quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    state.absmax = state.absmax.bfloat16().float()  # the store keeps its scales in bf16
    state.dtype = torch.float32
    return functional.dequantize_4bit(data, state)


ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "nf4": _nf4_round_trip,
    "bf16": lambda matrix: matrix.bfloat16().float(),
}
"""What a matrix becomes in each format of the store, in float32."""


def stored_tensors(format: str, **sizes: int | bool) -> dict[str, Tensor]:
    """The tensors of `flux_tensors`, with block matrices as a store in `format` holds them."""

    def stored(name: str, tensor: Tensor) -> Tensor:
        in_block = name.startswith(("double_blocks.", "single_blocks."))
        return ROUND_TRIPS[format](tensor) if in_block and tensor.ndim == 2 else tensor.float()

    return {name: stored(name, tensor) for name, tensor in flux_tensors(**sizes).items()}


def to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Original names to diffusers names by diffusers' converter, which knows only width 3072."""
    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    source = inspect.getsource(convert)
    assert "inner_dim = 3072" in source
    width = tensors["img_in.weight"].shape[0]
    scope = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)
    return scope[convert.__name__](dict(tensors))


def dense_transformer(tensors: dict[str, Tensor]) -> FluxTransformer2DModel:
    """A plain diffusers network that holds `tensors` (original names), in their dtype."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            in_channels=tensors["img_in.weight"].shape[1],
            num_layers=num_blocks(tensors, "double_blocks."),
            num_single_layers=num_blocks(tensors, "single_blocks."),
            num_attention_heads=tensors["img_in.weight"].shape[0] // 128,
            joint_attention_dim=tensors["txt_in.weight"].shape[1],
            pooled_projection_dim=tensors["vector_in.in_layer.weight"].shape[1],
            guidance_embeds="guidance_in.in_layer.weight" in tensors,
        )
    transformer.load_state_dict(to_diffusers(tensors), strict=True, assign=True)
    return transformer.requires_grad_(False)


def num_blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith(prefix)})
