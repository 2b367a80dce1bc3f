"""LoRA files as the trainers write them, with random values: names and shapes lie in
tests/data/lora_keys.json, written down from their savers for the FLUX of `flux_files`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

LISTS = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "lora_keys.json").read_text(encoding="utf-8")
)
ALPHA = 6.0


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: [*tensor.shape] for name, tensor in tensors.items()}


def written_by(trainer: str) -> dict[str, Tensor]:
    """The tensors of such a file in its order, that of their names; every alpha is `ALPHA`,
    magnitudes are near those of the base."""
    generator = torch.Generator().manual_seed([*LISTS].index(trainer))
    shapes = sorted(LISTS[trainer]["tensors"].items())
    return {name: _draw(generator, name, shape) for name, shape in shapes}


def _draw(generator: torch.Generator, name: str, shape: list[int]) -> Tensor:
    if name.endswith(".alpha"):
        return torch.tensor(ALPHA)
    noise = torch.randn(shape, generator=generator)
    return 1 + 0.1 * noise if name.endswith(("dora_scale", "magnitude_vector")) else 0.1 * noise
