"""What the hardware can do: which device, and which dtype to compute in."""

from __future__ import annotations

import torch

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():  # also AMD's cards
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("xpu" if torch.xpu.is_available() else "cpu")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that the GPU has free, or None where there is no such number."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype behind a setting; "auto" takes what `device` computes in at full speed.

    bf16 on NVIDIA cards from Ampere on and on CPUs with bf16 matrix units, fp16 on older cards
    (their bf16 is emulated), fp32 on other CPUs.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if _has_bf16(device) else torch.float16
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    return torch.bfloat16


def dtype_name(dtype: torch.dtype) -> str:
    """The setting that names `dtype`."""
    return next(name for name, value in _DTYPES.items() if value == dtype)


def _has_bf16(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; the questions are private in torch 2.5 to 2.13."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in questions)
