"""How well pictures fit texts: the picture–text score, from embeddings in one space."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require


def picture_text_scores(pictures: Tensor, texts: Tensor) -> list[float]:
    """100 times the cosine of each picture [N, D] with the text [N, D] in its place: -100..100.

    With the projected embeddings of a CLIP model, CLIPScore (Hessel et al. 2021,
    https://arxiv.org/abs/2104.08718) is max(0, score) / 40 for the model ViT-B/32 and texts that
    begin with "A photo depicts"; torchmetrics' CLIPScore is max(0, score) for its model. Scores of
    two models cannot be compared with each other.

    Raises:
        ValueError: the numbers or the widths of both differ, or an embedding is not finite.
    """
    require(
        pictures.shape == texts.shape,
        f"Pictures and texts must be as many and their embeddings as wide, got "
        f"{list(pictures.shape)} and {list(texts.shape)}.",
    )
    cosines = torch.nn.functional.cosine_similarity(pictures.double(), texts.double())
    require(
        bool(torch.isfinite(cosines).all()),
        "The model of the picture–text score gives values that are not finite. Choose other files "
        "of CLIP and CLIP vision.",
    )
    return [100 * cosine for cosine in cosines.tolist()]
