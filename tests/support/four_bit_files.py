"""FLUX files whose Linears bitsandbytes packed into 4 bits, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit, Params4bit
from dense import to_diffusers
from flux_files import flux_tensors
from safetensors.torch import save_file
from torch import Tensor


def linear4bit(
    matrix: Tensor, *, kind: str = "nf4", nested: bool = True, block_size: int = 64
) -> Linear4bit:
    """bitsandbytes' own layer of that matrix, packed on the CPU."""
    rows, columns = matrix.shape
    layer = Linear4bit(columns, rows, bias=False, quant_type=kind, compress_statistics=nested)
    layer.weight = Params4bit(
        matrix,
        requires_grad=False,
        quant_type=kind,
        compress_statistics=nested,
        blocksize=block_size,
    )
    return layer.to("cpu")


def dequantized(layer: Linear4bit) -> Tensor:
    """The matrix in float32, by bitsandbytes."""
    state = layer.weight.quant_state
    state.dtype = torch.float32
    return functional.dequantize_4bit(layer.weight.data, state)


class FourBitFlux:
    """A FLUX of one double and one single block under diffusers' names, every Linear packed."""

    def __init__(self, **packing: str | bool | int) -> None:
        plain = to_diffusers(flux_tensors())
        self.layers = {
            name: linear4bit(tensor, **packing)  # pyright: ignore[reportArgumentType]
            for name, tensor in plain.items()
            if tensor.ndim == 2
        }
        self.plain = {name: tensor for name, tensor in plain.items() if tensor.ndim == 1}

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.plain)
        for name, layer in self.layers.items():
            prefix = name.removesuffix("weight")
            tensors |= {f"{prefix}{end}": tensor for end, tensor in layer.state_dict().items()}
        return tensors

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in self.file_tensors().items()}, path)
        return path
