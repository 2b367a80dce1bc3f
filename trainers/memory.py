"""How much memory training needs beside the base model's weights."""

from __future__ import annotations

import torch

from .flux import FluxConfig

_BLOCK_TENSORS = 36
"""Tensors as wide as the network that one block keeps for its backward, its MLP counted as four
each way; from the shapes in a FLUX block."""


def activation_bytes(
    config: FluxConfig, *, num_tokens: int, batch_size: int, dtype: torch.dtype, checkpointing: bool
) -> int:
    """Bytes of activations of one micro-step, from the shapes of the network.

    Args:
        num_tokens: image and text tokens together.
        dtype: what the network computes in.
        checkpointing: whether each block keeps only its input and one is recomputed at a time.
    """
    one_tensor = num_tokens * batch_size * config.hidden_size * dtype.itemsize
    blocks = config.depth + config.depth_single
    kept = blocks + _BLOCK_TENSORS if checkpointing else blocks * _BLOCK_TENSORS
    return one_tensor * kept
