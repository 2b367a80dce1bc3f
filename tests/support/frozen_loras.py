"""Random LoRAs as part of a base model, and the dense weights that they come to."""

from __future__ import annotations

import torch
from atelier.trainers.frozen import FrozenLora
from torch import Tensor

WIDTH = 256
PLACES = {
    # a whole fused matrix, twice
    "double_blocks.0.img_attn.qkv": [(0, 3 * WIDTH), (0, 3 * WIDTH)],
    # only v; rows of q and k together, ending in neither
    "double_blocks.0.txt_attn.qkv": [(2 * WIDTH, WIDTH), (100, 300)],
    # q, k and v but no mlp; the mlp
    "single_blocks.0.linear1": [(0, 3 * WIDTH), (3 * WIDTH, 4 * WIDTH)],
    "single_blocks.0.linear2": [(0, WIDTH)],
    "double_blocks.0.img_mod.lin": [(0, 6 * WIDTH)],
    "txt_in": [(0, WIDTH)],
    # both halves, which diffusers swaps; one and a part of the other
    "final_layer.adaLN_modulation.1": [(0, 2 * WIDTH), (60, WIDTH)],
}
"""First row and number of rows of each LoRA on a Linear of `flux_files.write_flux`."""
COLUMNS = {"txt_in": 128, "single_blocks.0.linear2": 5 * WIDTH}
SCALES = (0.7, -1.3)


def frozen_loras(factor: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[FrozenLora, ...]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return (0.05 * torch.randn(shape, generator=generator)).to(dtype)

    return tuple(
        FrozenLora(
            name=name,
            start=start,
            down=draw(4, COLUMNS.get(name, WIDTH)),
            up=draw(rows, 4),
            scale=factor * scale,
        )
        for name, places in PLACES.items()
        for (start, rows), scale in zip(places, SCALES, strict=False)
    )


def merged(tensors: dict[str, Tensor], loras: tuple[FrozenLora, ...]) -> dict[str, Tensor]:
    """The tensors of a FLUX (original names) with the LoRAs added to them, in float32."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for lora in loras:
        delta = lora.scale * (lora.up.double() @ lora.down.double())
        rows = slice(lora.start, lora.start + len(delta))
        tensors[f"{lora.name}.weight"][rows] += delta.float()
    return tensors
