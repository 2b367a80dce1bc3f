"""What the tests compare with: plain diffusers networks, and quantization by other code.

Names are turned by diffusers' own converter; of the pack nothing computes here but the choice of
the codes of int4 and int2, which tests/test_store.py judges by its error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from atelier.trainers.packed_weight import PackedWeight
from bitsandbytes import functional
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from flux_files import flux_tensors
from torch import Tensor


def _bnb_round_trip(kind: str, matrix: Tensor) -> Tensor:
    data, state = functional.quantize_4bit(matrix, blocksize=64, quant_type=kind)
    state.absmax = state.absmax.bfloat16().float()  # the store keeps its scales in bf16
    state.dtype = torch.float32
    return functional.dequantize_4bit(data, state)


def _int8_round_trip(matrix: Tensor) -> Tensor:
    scale = (matrix.float().abs().amax(1, keepdim=True) / 127).bfloat16().float().numpy()
    return torch.from_numpy(np.rint(matrix.float().numpy() / scale).clip(-127, 127) * scale)


def _fp8_round_trip(matrix: Tensor) -> Tensor:
    """To the nearest of all numbers of e4m3: 1.mmm times 2^-6 … 2^8, and 0.mmm times 2^-6."""
    scale = (matrix.float().abs().amax(1, keepdim=True) / 448).bfloat16().float().numpy()
    exponents, mantissas = np.meshgrid(np.arange(-6, 9), np.arange(8))
    normal = (1 + mantissas / 8) * 2.0**exponents
    numbers = np.unique([*normal.flat, *(np.arange(8) / 8 * 2.0**-6)])
    numbers = numbers[numbers <= 448].astype(np.float32)
    value = matrix.float().numpy() / scale
    above = np.searchsorted(numbers, np.abs(value)).clip(1, len(numbers) - 1)
    middle = (numbers[above - 1] + numbers[above]) / 2
    is_low = np.abs(value) < middle
    is_low |= (np.abs(value) == middle) & (above % 2 == 1)  # halfway, the one with an even last bit
    return torch.from_numpy(np.sign(value) * numbers[above - is_low] * scale)


def _grouped_round_trip(bits: int, matrix: Tensor) -> Tensor:
    """The bytes of the store, read one code at a time."""
    packed = PackedWeight.pack(matrix, f"int{bits}")
    assert packed.scale is not None
    lines = packed.scale.float().numpy()
    rows, groups, _ = lines.shape
    data = packed.data.numpy().reshape(rows, groups, -1)
    codes = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    weights = np.concatenate(codes, axis=-1) * lines[..., :1] + lines[..., 1:]
    return torch.from_numpy(weights.reshape(rows, -1))


ROUND_TRIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "bf16": lambda matrix: matrix.bfloat16().float(),
    "fp8": _fp8_round_trip,
    "int8": _int8_round_trip,
    "nf4": partial(_bnb_round_trip, "nf4"),
    "fp4": partial(_bnb_round_trip, "fp4"),
    "int4": partial(_grouped_round_trip, 4),
    "int2": partial(_grouped_round_trip, 2),
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
