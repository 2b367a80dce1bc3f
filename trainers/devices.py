"""What the hardware can do: which device, which dtype to compute in, what a user may expect."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import psutil  # a package that ComfyUI needs
import torch

from .optimizer_settings import OF_BITSANDBYTES
from .packages import is_usable

_NO_BITSANDBYTES = (
    "The package bitsandbytes is missing here, or does not fit the others: the formats nf4 "
    "and fp4 and the optimizers of 8 bits need it, among them the default adamw8bit."
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():  # also AMD's cards
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("xpu" if torch.xpu.is_available() else "cpu")


def give_back_memory() -> None:
    """Return freed memory to the system where the C library would keep it.

    glibc keeps the holes that temporary tensors leave between others: 2 GB after FLUX.1-dev has
    been packed. Other libraries have no such call, or no such need.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on the device, or None where there is no such number. What torch holds
    and does not use is free too."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available if device.type == "cpu" else None


def memory_in_use(device: torch.device) -> tuple[int | None, int]:
    """Bytes of the device that torch has given out, None where it is a CPU or does not tell; and
    bytes of this process in RAM."""
    of_device = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    return of_device, psutil.Process().memory_info().rss


@dataclass(frozen=True)
class SystemMemory:
    """Bytes of RAM."""

    free: int
    """What the system can give without swapping."""
    total: int


def system_memory() -> SystemMemory:
    """RAM as the system counts it now."""
    memory = psutil.virtual_memory()
    return SystemMemory(memory.available, memory.total)


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


def describe_device(device: torch.device) -> str:
    """What runs on a device, in a sentence for a user.

    Raises nothing where bitsandbytes is missing, but says on a second line what does not run then.
    """
    sentence = _what_runs(device)
    if is_usable("bitsandbytes"):
        return sentence
    return "\n".join([sentence, _NO_BITSANDBYTES])


def _what_runs(device: torch.device) -> str:
    """With bitsandbytes, whose part is after the table of its 0.50."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "On AMD cards every format and the training should run; it was not tried."
    if device.type == "cuda" and _has_bf16(device):
        return "This NVIDIA card runs every format and the training, computing in bf16."
    if device.type == "cuda":
        return (
            "This NVIDIA card, from before the RTX 30 series, runs every format and the training, "
            "computing in fp16 with scaled gradients."
        )
    if device.type == "xpu":
        return "On Intel cards every format and the training should run; it was not tried."
    if device.type == "mps":
        return (
            "On Apple's GPUs pictures are made in every format but fp8; training should run with "
            "an optimizer that is not of 8 bits, such as adamw; it was not tried."
        )
    return "On a CPU everything runs, FLUX.1-dev slowly: take the nano model."


def has_fp8(device: torch.device) -> bool:
    """Whether torch has 8-bit floats on a device."""
    return device.type != "mps"


def require_format_on(format: str, device: torch.device | str) -> None:
    """Raises ValueError where a device cannot hold weights in a format, or make them."""
    if format == "fp8" and not has_fp8(torch.device(device)):
        raise ValueError(
            "Apple's GPUs cannot hold weights in fp8. Load the model as int8, which takes as much "
            "memory with a smaller error, or as nf4; or start ComfyUI with --cpu."
        )


def require_trainable_on(device: torch.device, optimizer: str) -> None:
    """Raises ValueError where the optimizer does not run."""
    if device.type == "mps" and optimizer in OF_BITSANDBYTES:
        raise ValueError(
            f"The optimizer {optimizer} does not run on Apple's GPUs: bitsandbytes has it for "
            "NVIDIA, AMD and Intel cards and for CPUs. Choose another in Optimizer Settings, such "
            "as adamw, or start ComfyUI with --cpu."
        )


def dtype_name(dtype: torch.dtype) -> str:
    """The setting that names `dtype`."""
    return next(name for name, value in _DTYPES.items() if value == dtype)


def _has_bf16(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 itself; the questions are private in torch 2.5 to 2.13."""
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in questions)
