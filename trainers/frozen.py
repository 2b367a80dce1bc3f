"""LoRAs that belong to the model a new one is trained on: they compute, and never change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import read_safetensors, write_safetensors


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenLora:
    """A LoRA on some rows of a Linear: y[start : start + rows] += scale * up(down(x))."""

    name: str
    """The Linear's original name, such as `double_blocks.0.img_attn.qkv`."""
    start: int
    down: Tensor
    """[rank, in]"""
    up: Tensor
    """[rows, rank]"""
    scale: float
    """Its strength times alpha / rank."""

    def ready(self, device: torch.device, dtype: torch.dtype) -> FrozenLora:
        """The same in `dtype` on `device`, with a scale of 1."""
        up = (self.up.float() * self.scale).to(device, dtype)
        return dataclasses.replace(self, down=self.down.to(device, dtype), up=up, scale=1.0)

    def up_for(self, rows: range) -> Tensor | None:
        """`up` as these rows of the Linear see it [rows, rank], 0 where the LoRA has none; None
        where it has none at all."""
        first = max(rows.start, self.start)
        last = min(rows.stop, self.start + len(self.up))
        if first >= last:
            return None
        part = self.up[first - self.start : last - self.start]
        if len(part) == len(rows):
            return part
        whole = part.new_zeros(len(rows), part.shape[1])
        whole[first - rows.start : last - rows.start] = part
        return whole


def frozen_bytes(loras: Sequence[FrozenLora], dtype: torch.dtype) -> int:
    """What they take when they compute in `dtype`."""
    return sum((lora.down.numel() + lora.up.numel()) * dtype.itemsize for lora in loras)


def fingerprint(loras: Sequence[FrozenLora]) -> str:
    """SHA-256 over all of their numbers and places; empty for no LoRAs."""
    digest = hashlib.sha256()
    for lora in loras:
        places = [lora.name, lora.start, lora.scale]
        for tensor in (lora.down, lora.up):
            digest.update(json.dumps([*places, str(tensor.dtype), *tensor.shape]).encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if loras else ""


def save_frozen(path: Path, loras: Sequence[FrozenLora]) -> None:
    """Write them, in their order, as `<number>.down` and `<number>.up`; the rest is metadata.

    Raises:
        ValueError: if the disk is full or refuses.
    """
    tensors, places = {}, []
    for number, lora in enumerate(loras):
        tensors |= {f"{number}.down": lora.down, f"{number}.up": lora.up}
        places.append({"name": lora.name, "start": lora.start, "scale": lora.scale})
    write_safetensors(path, tensors, {"loras": json.dumps(places)})


def load_frozen(path: Path) -> tuple[FrozenLora, ...]:
    """Read what `save_frozen` wrote.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    tensors, metadata = read_safetensors(path)
    try:
        return tuple(
            FrozenLora(**place, down=tensors[f"{number}.down"], up=tensors[f"{number}.up"])
            for number, place in enumerate(json.loads(metadata["loras"]))
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"'{path.name}' does not hold the LoRAs of a run's MODEL: {error!r}. Copy the file "
            "of this name out of the run again, or start a new run."
        ) from error
