"""What is said before a training starts: whether it fits into the memory, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from .config import LoraSettings
from .devices import has_fp8
from .flux import FluxConfig
from .load import BaseFlux, FluxFile, LoadedFlux
from .memory import MemoryEstimate, Workload, estimate_training, store_bytes, streamed_bytes
from .packages import is_usable

_NOTHING_FITS = (
    "No single change is enough: take a smaller format, smaller pictures, a batch size of 1 and "
    "gradient_checkpointing together."
)
_NOTHING_FITS_FROM_CORE = (
    "No single change is enough: load the model by Load Quantized FLUX in a small format, and take "
    "smaller pictures, a batch size of 1 and gradient_checkpointing together."
)


def auto_formats() -> tuple[str, ...]:
    """What `auto` chooses from, the most exact first (docs/formats.md).

    fp8 takes as much as int8 with a larger error. Of the two with 4 bits nf4 is the recipe's, and
    bitsandbytes' kernels unpack it several times faster; int4, whose error is smaller by less than
    a tenth and which takes more, is for where there is no bitsandbytes. Below them the error is so
    large that streaming 4 bits is the better choice.
    """
    return "bf16", "int8", "nf4" if is_usable("bitsandbytes") else "int4"


def choose_format(file: FluxFile, free_bytes: int, device: torch.device) -> str:
    """The most exact of `auto_formats` whose weights fit into `free_bytes`, else the last of them.

    A file that is packed already stays as it is, unless a smaller format is needed: nothing else
    would be won.
    """
    sizes = {name: store_bytes(file.config, name) for name in auto_formats()}
    if file.format is not None and (file.format != "fp8" or has_fp8(device)):
        own = store_bytes(file.config, file.format)
        smaller = {name: size for name, size in sizes.items() if size < own}
        sizes = {file.format: own, **smaller}
    fitting = (name for name, size in sizes.items() if size <= free_bytes)
    return next(fitting, [*sizes][-1])


def describe_choice(file: FluxFile, format: str, *, free_gb: float, reserve_gb: float) -> str:
    """A sentence for a user: what `choose_format` took of the free GB without the reserve."""
    return (
        f"Format auto chose {format}: {store_bytes(file.config, format) / 1e9:.1f} GB of weights, "
        f"where {free_gb:.1f} GB are free and {reserve_gb:.1f} GB of them reserved."
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A training that has not started, and where it would run."""

    config: FluxConfig
    format: str
    weights: int
    """Bytes that the weights take when none is streamed."""
    workload: Workload
    device: torch.device
    streaming: str
    """A value of config.STREAMING."""
    other_copy: int = 0
    """Bytes of the same weights that the host keeps for itself, in system memory."""
    is_from_core: bool = False
    """Whether a loader of the host gave the model: it has none of our loader's settings."""

    @classmethod
    def of(cls, base: BaseFlux, workload: Workload, device: torch.device) -> Plan:
        """The training of `workload` on a model that is loaded."""
        return cls(
            config=base.config,
            format=base.format,
            weights=base.store.num_bytes,
            workload=workload,
            device=device,
            streaming=base.store.streaming,
            is_from_core=not isinstance(base, LoadedFlux),
        )

    @property
    def needed(self) -> MemoryEstimate:
        """With all weights on the device. On a CPU nothing can leave it for system memory."""
        keeps = self.workload.activations_in_ram and self.device.type == "cpu"
        workload = self._workload(activations_in_ram=False) if keeps else self.workload
        estimate = estimate_training(self.config, self.format, workload)
        return replace(estimate, weights=self.weights)

    @property
    def least_bytes(self) -> int:
        """What is needed on the device with every block streamed, if blocks can be."""
        if not self.can_stream:
            return self.needed.total
        return streamed_bytes(self.config, self.format) + self.needed.beside_weights

    @property
    def can_stream(self) -> bool:
        if self.device.type == "cpu":  # blocks in its RAM are on it
            return self.streaming == "disk"
        return self.streaming != "off"

    def with_workload(self, **changes: Any) -> Plan:
        return replace(self, workload=self._workload(**changes))

    def with_format(self, format: str) -> Plan:
        weights = store_bytes(self.config, format)
        return replace(self, format=format, weights=weights)

    def _workload(self, **changes: Any) -> Workload:
        return replace(self.workload, **changes)


def require_fits(plan: Plan, free_bytes: int) -> list[str]:
    """Sentences for a user, when the model is loaded and the training about to start.

    Args:
        free_bytes: of a GPU those that are free without the model, of a CPU those beside it.

    Raises:
        ValueError: if they are not enough, with what would fit.
    """
    if plan.device.type == "cpu" and plan.streaming != "disk":
        free_bytes += plan.weights  # they are there already
    if plan.least_bytes > free_bytes:
        raise ValueError("\n".join(what_would_fit(plan, free_bytes)))
    return describe(plan, free_bytes)


def describe(plan: Plan, free_bytes: int) -> list[str]:
    """Sentences for a user: what the training takes, whether it fits, and what would fit."""
    needed = plan.needed
    lines = [
        f"The training takes {_gb(needed.total)} on the device: {_gb(needed.weights)} for the "
        f"weights in {plan.format}, {_gb(needed.activations)} for activations, "
        f"{_gb(needed.adapters)} for the LoRA and its gradients, {_gb(needed.optimizer)} for the "
        f"optimizer, {_gb(needed.batch)} for a batch."
    ]
    if plan.device.type != "cpu" and plan.streaming != "disk":
        lines.append(f"Off the device, the weights take {_gb(needed.weights)} of system memory.")
    if plan.other_copy:
        lines.append(f"The MODEL's own copy takes {_gb(plan.other_copy)} more of system memory.")
    if needed.total <= free_bytes:
        return [*lines, f"It fits: {_gb(free_bytes)} are free."]
    least = plan.least_bytes
    if least > free_bytes:
        return [*lines, *what_would_fit(plan, free_bytes)]
    lines.append(
        f"It fits when blocks are streamed, which happens by itself: {_gb(free_bytes)} are free, "
        f"and {_gb(least)} are needed at least."
    )
    return lines


def what_would_fit(plan: Plan, free_bytes: int) -> list[str]:
    """Sentences for a training that does not fit even with every block streamed."""
    least, free = _gb(plan.least_bytes), _gb(free_bytes)
    if plan.can_stream:
        first = (
            f"This training does not fit: {least} of the device's memory are needed with every "
            f"block streamed, and {free} are free."
        )
    else:
        first = (
            f"This training does not fit: {least} of the device's memory are needed, and {free} "
            "are free."
        )
    fitting = [sentence for size, sentence in _smaller(plan) if size <= free_bytes]
    fitting += _fitting_format(plan, free_bytes)
    nothing_fits = _NOTHING_FITS_FROM_CORE if plan.is_from_core else _NOTHING_FITS
    return [first, *(fitting or [nothing_fits])]


def _fitting_format(plan: Plan, free_bytes: int) -> list[str]:
    """A sentence for the most exact format in which the training fits, if there is one."""
    for name in (*auto_formats(), "int2"):
        size = plan.with_format(name).least_bytes
        if size > free_bytes:
            continue
        if plan.is_from_core:
            return [f"Loaded by Load Quantized FLUX in the format {name}, {_gb(size)} are enough."]
        return [f"With format {name} of Load Quantized FLUX {_gb(size)} are enough."]
    return []


def _smaller(plan: Plan) -> Iterator[tuple[int, str]]:
    """Single changes that take less memory: the bytes, and a sentence for when they fit."""
    is_on_cpu, workload = plan.device.type == "cpu", plan.workload
    if not plan.can_stream and not plan.is_from_core:
        streaming = "disk" if is_on_cpu else "auto"
        size = replace(plan, streaming=streaming).least_bytes
        yield (
            size,
            f"With block_streaming {streaming} of Load Quantized FLUX {_gb(size)} are enough.",
        )
    if not workload.gradient_checkpointing:
        size = plan.with_workload(gradient_checkpointing=True).least_bytes
        yield size, f"With gradient_checkpointing {_gb(size)} are enough."
    if not workload.activations_in_ram and not is_on_cpu:
        size = plan.with_workload(activations_in_ram=True).least_bytes
        yield size, f"With activations_in_ram {_gb(size)} are enough."
    if workload.batch_size > 1:
        size = plan.with_workload(batch_size=1).least_bytes
        yield size, f"With a batch size of 1 {_gb(size)} are enough."
    recipe = LoraSettings()
    if workload.lora.rank > recipe.rank:
        size = plan.with_workload(lora=replace(workload.lora, rank=recipe.rank)).least_bytes
        yield size, f"With a rank of {recipe.rank} {_gb(size)} are enough."
    if workload.lora.targets != recipe.targets:
        size = plan.with_workload(lora=replace(workload.lora, targets=recipe.targets)).least_bytes
        yield size, f"With the targets {recipe.targets} {_gb(size)} are enough."
    width, height = _half(workload.width), _half(workload.height)
    size = plan.with_workload(width=width, height=height).least_bytes
    yield size, f"With pictures of {width}x{height} {_gb(size)} are enough."


def _half(pixels: int) -> int:
    """Half of a side, a multiple of 16."""
    return max(16, pixels // 32 * 16)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
