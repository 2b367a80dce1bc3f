"""Every kind of LoRA that can be trained, with numbers as if it had been."""

from __future__ import annotations

import torch
from atelier.trainers.adapters import Lora, attach_lora
from atelier.trainers.load import LoadedFlux
from atelier.trainers.lora_settings import LoraSettings
from torch import nn

KINDS = {
    "lora": LoraSettings(rank=4, alpha=2.0, targets="all"),
    "of all layers": LoraSettings(rank=3, targets="ai-toolkit"),
    "rslora": LoraSettings(rank=4, alpha=6.0, rslora=True),
    "own ranks": LoraSettings(rank=2, rank_patterns="to_q: 5\nsingle_blocks.0: 3", targets="all"),
    "own ranks and alpha": LoraSettings(rank=2, alpha=3.0, rank_patterns="attn.to_v: 6"),
    "pissa": LoraSettings(rank=4, alpha=2.0, init="pissa"),
    "olora": LoraSettings(rank=4, init="olora", targets="all"),
    "dora": LoraSettings(rank=4, alpha=2.0, dora=True, targets="all+ffs"),
    "lokr": LoraSettings(rank=3, alpha=1.5, kind="lokr", lokr_factor=4, targets="all+ffs"),
    "lokr of whole matrices": LoraSettings(kind="lokr", lokr_factor=8, full_matrix=True),
    "loha": LoraSettings(rank=3, alpha=1.5, kind="loha", targets="all+ffs"),
}


def trained_like(transformer: nn.Module, settings: LoraSettings, base: LoadedFlux) -> Lora:
    """Other numbers in everything that is learned."""
    lora = attach_lora(transformer, settings, seed=1, base=base)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in lora.parameters.items():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("magnitude"):
                parameter.mul_(1 + 0.1 * noise)
            else:
                parameter.add_((0.3 if "hada" in name else 0.05) * noise)
    return lora
