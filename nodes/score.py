"""The picture–text score with ComfyUI's CLIP and CLIP vision objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainers import score
from ..trainers.tensor_files import read_header
from .encoders import patcher_identity, token_ids

_ENCODERS = ("clip_l", "clip_h", "clip_g")
_MODELS = {768: "ViT-L/14", 1024: "ViT-H/14", 1280: "ViT-bigG/14"}
"""Width of the space that pictures and texts share, and the CLIP that has it."""


def picture_text_scores(
    clip_vision: Any, clip: Any, pictures: Tensor, texts: Sequence[str]
) -> list[float]:
    """100 times the cosine of each picture with its text, in the space of a CLIP model.

    Of a CLIP with several text encoders the one that fits `clip_vision` is taken. Pictures are
    prepared as CLIP's are: the shorter side resized to the model's size, the middle cut out. Texts
    are literal (no weights in brackets) and cut at the length of the model, 77 tokens, as in
    transformers; ComfyUI, which encodes the rest as further parts, also takes this vector from the
    first part. What the score is, and in which case
    it equals CLIPScore, is in `trainers/score.py`.

    Args:
        clip_vision: from ComfyUI's Load CLIP Vision, with a projection.
        clip: from Load CLIP or a checkpoint, with a text projection.
        pictures: [N, H, W, 3] in 0..1.
        texts: N of them.

    Raises:
        ValueError: one of the two has no projection, or they are not of one CLIP model.
    """
    name = require_one_space(clip_vision, clip)
    with torch.no_grad():
        embeds = [clip_vision.encode_image(one[None])["image_embeds"] for one in pictures]
        return score.picture_text_scores(
            torch.cat(embeds).cpu(), _text_embeds(clip, name, list(texts)).cpu()
        )


def require_one_space(clip_vision: Any, clip: Any) -> str:
    """The name of the text encoder of `clip` that has one space with `clip_vision`.

    Raises:
        ValueError: as `picture_text_scores`, which checks it too.
    """
    space = _picture_space(clip_vision)
    clip.load_model()
    return _text_encoder(clip, space)


def score_identity(clip_vision: Any, clip: Any) -> str:
    """What tells one model of the score from another."""
    return patcher_identity(clip_vision.patcher) + patcher_identity(clip.patcher)


def _picture_space(clip_vision: Any) -> int:
    """The width of the space into which pictures are projected."""
    projection = getattr(clip_vision.model, "visual_projection", None)
    if not hasattr(projection, "out_features") or not _is_from_file(projection, "cpu"):
        raise ValueError(
            "This CLIP vision model has no projection into the space of texts, so it gives no "
            "picture–text score. Choose the file of a whole CLIP in Load CLIP Vision, such as "
            "clip-vit-large-patch14."
        )
    return projection.out_features


def _text_encoder(clip: Any, space: int) -> str:
    """The name of the network in `clip` that gives texts in a space of this width."""
    networks = clip.cond_stage_model
    projections = {
        name: getattr(networks, name).transformer.text_projection
        for name in _ENCODERS
        if hasattr(networks, name)
    }
    name = next((n for n, one in projections.items() if one.out_features == space), None)
    model = f" ({_MODELS[space]})" if space in _MODELS else ""
    if name is None:
        widths = " and ".join(str(one.out_features) for one in projections.values()) or "no"
        raise ValueError(
            f"The CLIP does not fit the CLIP vision model, which gives {space} numbers of a "
            f"picture: it gives {widths} of a text. Load the text encoder of the same CLIP{model}."
        )
    device = clip.patcher.load_device
    if not _is_from_file(projections[name], device) or not _is_in_files(clip, space):
        raise ValueError(
            f"The file of the text encoder {name} has no text_projection, as FLUX's usual "
            "clip_l.safetensors has none, so its texts are not in the space of the pictures. "
            f"Choose a file with text_projection.weight of the same CLIP{model} in Load CLIP."
        )
    return name


def _text_embeds(clip: Any, name: str, texts: list[str]) -> Tensor:
    """Texts as vectors [N, D] in the space of pictures."""
    networks = clip.cond_stage_model
    tokenizer = getattr(clip.tokenizer, name)
    tokens = token_ids(tokenizer, texts, tokenizer.max_length)
    networks.reset_clip_options()
    options = {"execution_device": clip.patcher.load_device, "projected_pooled": True}
    networks.set_clip_options(options)
    try:
        return getattr(networks, name).encode(tokens)[1]
    finally:
        networks.reset_clip_options()


def _is_from_file(projection: Any, device: Any) -> bool:
    """Whether the matrix of a projection can be one that was read.

    ComfyUI leaves a matrix that its file lacks as it finds it in memory, often zeros or no numbers;
    others fill in the identity. Computing with it also shows a matrix that is packed or patched.
    """
    matrix = projection(torch.eye(projection.in_features, device=device)).float()
    if not bool(torch.isfinite(matrix).all()) or not bool((matrix != 0).any(dim=0).all()):
        return False
    return not torch.equal(matrix, torch.eye(*matrix.shape, device=matrix.device))


def _is_in_files(clip: Any, space: int) -> bool:
    """Whether a file of this CLIP has a text projection.

    Versions from 2026 on remember the files; with an older one the matrix must tell.
    """
    loader = getattr(clip.patcher, "cached_patcher_init", None)
    named = loader[1][0] if loader else []
    files = [Path(path) for path in ([named] if isinstance(named, str) else named)]
    if not files or any(path.suffix != ".safetensors" for path in files):
        return True
    return any(
        "text_projection" in name and entry.shape[-1] == space
        for path in files
        for name, entry in read_header(path)[0].items()
    )
