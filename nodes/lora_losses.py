"""What Export and Merge LoRA say of what is not in the new file, or not read by other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..trainers.flux_lora import FluxLora
from ..trainers.lora_export import ranks_of_parts, resized, share_kept
from ..trainers.lora_file import LoraTensors
from ..trainers.lora_metadata import different_bases


def left_out(lora: FluxLora) -> list[str]:
    if not lora.unknown:
        return []
    some = ", ".join(lora.unknown[:3])
    return [f"Left out, because FLUX.1 has no such modules: {len(lora.unknown)}, such as {some}."]


def cut(lora: FluxLora, smaller: FluxLora) -> list[str]:
    """What a new rank took away."""
    if smaller is lora:
        return []
    kept = share_kept(lora, smaller)
    return [f"Of what the LoRA did, its new rank keeps {kept:.1%} (squared)."]


def cut_lokrs(name: str, lora: FluxLora, rank: int) -> list[str]:
    """What a merge, which makes LoRAs of them, took away from the LoKrs of a file."""
    adapters = tuple(a for a in (*lora.adapters, *lora.text) if a.kind == "lokr")
    if not adapters:
        return []
    lokrs = FluxLora(adapters=adapters, rest={})
    kept = share_kept(lokrs, resized(lokrs, rank))
    return [f"Of the LoKrs of '{name}', rank {rank} keeps {kept:.1%} (squared)."]


def cut_sum(whole: FluxLora, smaller: FluxLora) -> list[str]:
    """What a new rank took away from the sum, in which LoKrs are LoRAs already."""
    if smaller is whole:
        return []
    kept = share_kept(whole, smaller)
    return [f"Of the sum of the LoRAs, its new rank keeps {kept:.1%} (squared)."]


def unlike_in_diffusers(lora: FluxLora, format: str) -> list[str]:
    """What diffusers does otherwise with a file of this format."""
    said, found = [], ranks_of_parts(lora)
    if format != "diffusers" and len(found) > 1:
        said.append(
            f"The modules have different ranks, {found[0]} to {found[-1]}: diffusers would read "
            "this file at another strength. Choose the format diffusers for it."
        )
    if format == "diffusers" and any(adapter.name.startswith("t5xxl.") for adapter in lora.text):
        said.append(
            "The part for T5 does nothing in diffusers, which loads none. For ComfyUI choose the "
            "format comfyui."
        )
    return said


def rounded_to_zero(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Tensors of which a dtype left nothing."""
    gone = [name for name, tensor in before.items() if tensor.any() and not after[name].any()]
    if not gone:
        return []
    dtype = str(after[gone[0]].dtype).removeprefix("torch.")
    return [
        f"Too small for {dtype}, and now 0: {len(gone)} tensors, such as '{gone[0]}'. Choose fp32 "
        "or bf16."
    ]


def of_different_bases(loras: Sequence[LoraTensors]) -> list[str]:
    found = different_bases(loras)
    if not found:
        return []
    return [
        f"The LoRAs were trained on different models: {', '.join(found)}. Their sum may do little "
        "on any of them."
    ]
