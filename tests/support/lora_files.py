"""LoRA files of every kind that ComfyUI's loaders read, with random values."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, RANK = 256, 4
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"
PROJ = "diffusion_model.double_blocks.0.img_attn.proj"
ATTENTION = "transformer.transformer_blocks.0.attn"
FUSED = "transformer.single_transformer_blocks.0.proj_mlp"


def write_loras(folder: Path) -> None:
    """One file per kind of `KINDS`, such as plain.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KINDS:
        save_file(lora_tensors(name), folder / f"{name}.safetensors")


def lora_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of the file of this kind."""
    return KINDS[name](torch.Generator().manual_seed([*KINDS].index(name)))


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    return 0.1 * torch.randn(shape, generator=generator)


def _low_rank(
    generator: torch.Generator, name: str, rows: int, alpha: float | None
) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_A.weight": _draw(generator, RANK, WIDTH),
        f"{name}.lora_B.weight": _draw(generator, rows, RANK),
    }
    return tensors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def _plain(generator: torch.Generator) -> dict[str, Tensor]:
    """Diffusers' names: rows of fused matrices, and one with another alpha than its rank."""
    return {
        **_low_rank(generator, f"{ATTENTION}.to_q", WIDTH, 4.0),
        **_low_rank(generator, f"{ATTENTION}.to_v", WIDTH, 4.0),
        **_low_rank(generator, FUSED, 4 * WIDTH, 1.0),
    }


def _without_alpha(generator: torch.Generator) -> dict[str, Tensor]:
    return _low_rank(generator, QKV, 3 * WIDTH, None)


def _lokr(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        f"{PROJ}.lokr_w1": 10 * _draw(generator, 4, 4),
        f"{PROJ}.lokr_w2_a": _draw(generator, 64, RANK),
        f"{PROJ}.lokr_w2_b": _draw(generator, RANK, 64),
        f"{PROJ}.alpha": torch.tensor(2.0),
    }


def _loha(generator: torch.Generator) -> dict[str, Tensor]:
    tensors = {}
    for part in ("w1", "w2"):
        tensors[f"{QKV}.hada_{part}_a"] = 3 * _draw(generator, 3 * WIDTH, RANK)
        tensors[f"{QKV}.hada_{part}_b"] = 3 * _draw(generator, RANK, WIDTH)
    return {**tensors, f"{QKV}.alpha": torch.tensor(3.0)}


def _dora(generator: torch.Generator) -> dict[str, Tensor]:
    scale = 1 + _draw(generator, WIDTH, 1)
    return {**_low_rank(generator, PROJ, WIDTH, 2.0), f"{PROJ}.dora_scale": scale}


def _difference(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        f"{PROJ}.diff": 0.2 * _draw(generator, WIDTH, WIDTH),
        f"{PROJ}.diff_b": _draw(generator, WIDTH),
    }


def _final_layer(generator: torch.Generator) -> dict[str, Tensor]:
    """Diffusers swaps the two halves of these rows."""
    return _low_rank(generator, "transformer.norm_out.linear", 2 * WIDTH, 2.0)


def _original_final_layer(generator: torch.Generator) -> dict[str, Tensor]:
    name = "diffusion_model.final_layer.adaLN_modulation.1"
    return _low_rank(generator, name, 2 * WIDTH, None)


KINDS = {
    "plain": _plain,
    "without_alpha": _without_alpha,
    "lokr": _lokr,
    "loha": _loha,
    "dora": _dora,
    "difference": _difference,
    "final_layer": _final_layer,
    "original_final_layer": _original_final_layer,
}
