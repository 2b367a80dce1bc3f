"""The CLIP face: ComfyUI's own text encoders computing with a weight store."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.sd
import comfy.text_encoders.flux as flux_text_encoders
import comfy.utils
import torch
from comfy.supported_models_base import ClipTarget
from torch import Tensor

from ..trainers.text_encoders import ClipSizes, LoadedTextEncoders, T5Sizes
from .linear import PlacedLoras, StoreModule, StoreOps
from .native import StorePatcher


class StoreClip(comfy.sd.CLIP):
    """A CLIP over a store. Nodes that save it get what computes: bf16 matrices with its LoRAs.

    ComfyUI takes the state of the networks both to save them and to learn names, which must cost
    nothing; so the two are told apart here.
    """

    def clone(self, **newer: Any) -> StoreClip:
        clone = super().clone(**newer)
        clone.__class__ = StoreClip  # the host makes its own class
        return clone

    def get_sd(self) -> dict[str, Tensor]:
        return self.patcher.model_state_dict("")

    state_dict_for_saving = get_sd  # what newer versions call


def build_text_encoders(loaded: LoadedTextEncoders, embeddings: list[str]) -> StoreClip:
    """A true ComfyUI CLIP of FLUX's kind over `loaded.store`, computing in float32 as all do.

    Args:
        embeddings: folders of textual inversions.
    """
    options = {
        "clip_l_model_config": _clip_l_config(loaded.clip_l),
        "t5xxl_model_config": _t5xxl_config(loaded.t5xxl),
        "custom_operations": StoreOps,
        "dtype": torch.bfloat16,
        # Norms are filled below; elsewhere the host would load the patcher that is replaced.
        "initial_device": torch.device("meta"),
    }
    target = ClipTarget(
        flux_text_encoders.FluxTokenizer, flux_text_encoders.flux_clip(dtype_t5=torch.bfloat16)
    )
    newer = {"disable_dynamic": True}  # from 2026 on; ours is none either
    known = inspect.signature(comfy.sd.CLIP.__init__).parameters
    with torch.inference_mode(False):
        clip = StoreClip(
            target,
            embedding_directory=embeddings,
            tokenizer_data={"clip_l_max_length": loaded.clip_l.num_positions},
            model_options=options,
            **{name: value for name, value in newer.items() if name in known},
        )
        networks = clip.cond_stage_model
        for name, module in networks.named_modules():
            if isinstance(module, StoreModule):
                module.bind(loaded.store, _store_name(name))
        for name, parameter in [*networks.named_parameters()]:
            if parameter.is_meta:
                stored = loaded.store.plain[_store_name(name)]
                comfy.utils.set_attr_param(networks, name, stored.clone())
    networks.atelier, networks.atelier_loras = loaded, PlacedLoras()
    replaced = clip.patcher
    clip.patcher = StorePatcher(networks, replaced.load_device, replaced.offload_device)
    clip.patcher.is_clip, clip.patcher.hook_mode = True, replaced.hook_mode
    return clip


def _store_name(name: str) -> str:
    """`t5xxl.encoder.….weight` of the host's `t5xxl.transformer.encoder.….weight`."""
    return name.replace(".transformer.", ".", 1)


def _clip_l_config(sizes: ClipSizes) -> dict[str, int]:
    return {
        "hidden_size": sizes.width,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
        "max_position_embeddings": sizes.num_positions,
    }


def _t5xxl_config(sizes: T5Sizes) -> dict[str, int]:
    return {
        "d_model": sizes.width,
        "d_ff": sizes.feed_forward,
        "num_layers": sizes.depth,
        "num_heads": sizes.num_heads,
        "d_kv": sizes.head_size,
    }
