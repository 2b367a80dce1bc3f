"""What is said before a training starts: whether it fits into the memory, and what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch

from .compiled import require_compiler
from .devices import SystemMemory, has_fp8
from .eight_bit import has_products, require_products
from .load import FluxFile
from .lora_settings import LoraSettings
from .memory import store_bytes
from .optimizers import require_optimizer
from .packages import is_usable
from .plan import Plan

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


def require_fits(plan: Plan, free_bytes: int, ram: SystemMemory) -> list[str]:
    """Sentences for a user, when the model is loaded and the training about to start.

    System memory that is not free is said, and no reason to refuse: the number is of this moment,
    and the system makes room by swapping, or by dropping what it has cached. More than the machine
    has is one: nearly all of it is page-locked, so no swap file can take it.

    Args:
        free_bytes: of a GPU those that are free without the model, of a CPU those beside it.

    Raises:
        ValueError: if they are not enough, with what would fit; or if the device cannot compute or
            compile what is wanted.
    """
    workload = plan.workload
    require_products(workload.speed.products, plan.device, plan.format)
    require_optimizer(workload.optimizer, workload.lora.kind, workload.dtype)
    if workload.speed.compile:
        require_compiler(plan.device)
    if plan.device.type == "cpu" and plan.streaming != "disk":
        free_bytes += plan.weights  # they are there already
    if plan.least_bytes > free_bytes:
        raise ValueError("\n".join(what_would_fit(plan, free_bytes, ram)))
    if plan.has_own_memory and plan.ram_needed(free_bytes) > ram.total:
        first = (
            f"This training does not fit: {_gb(plan.ram_needed(free_bytes))} of system memory are "
            f"needed, and the machine has {_gb(ram.total)}."
        )
        raise ValueError("\n".join([first, *_what_needs_less_ram(plan, free_bytes, ram)]))
    return describe(plan, free_bytes, ram)


def describe(plan: Plan, free_bytes: int, ram: SystemMemory) -> list[str]:
    """Sentences for a user: what the training takes, whether it fits, and what would fit."""
    needed = plan.needed
    lines = [
        f"The training takes {_gb(needed.total)} on the device: {_gb(needed.weights)} for the "
        f"weights in {plan.format}, {_gb(needed.activations)} for activations, "
        f"{_gb(needed.adapters)} for the LoRA and its gradients, {_gb(needed.optimizer)} for the "
        f"optimizer, {_gb(needed.batch)} for a batch."
    ]
    lines += _describe_ram(plan, free_bytes, ram)
    if needed.total <= free_bytes:
        lines += _describe_kept(plan, free_bytes - needed.weights)
        return [*lines, f"It fits: {_gb(free_bytes)} are free."]
    least = plan.least_bytes
    if least > free_bytes:
        return [*lines, *what_would_fit(plan, free_bytes, ram)]
    lines.append(
        f"It fits when blocks are streamed, which happens by itself: {_gb(free_bytes)} are free, "
        f"and {_gb(least)} are needed at least."
    )
    return lines


def _describe_kept(plan: Plan, room: int) -> list[str]:
    """What selective checkpointing does with `room` bytes beside the weights."""
    workload = plan.workload
    if workload.speed.checkpointing != "selective" or not workload.gradient_checkpointing:
        return []
    kept, whole = plan.most_kept_blocks(room), plan.config.num_blocks
    return [f"Of {whole} blocks {kept} keep their activations, and the others are computed twice."]


def _describe_ram(plan: Plan, free_bytes: int, ram: SystemMemory) -> list[str]:
    """The same of system memory; of a device that computes there, all is said."""
    copies = []
    if plan.other_copy:
        copies = [f"The MODEL's own copy takes {_gb(plan.other_copy)} more of system memory."]
    if not plan.has_own_memory:
        return copies
    parts, needed, room = plan.ram(free_bytes), plan.ram_needed(free_bytes), _room(plan, ram)
    lines = [
        f"Of system memory it takes {_gb(parts.total)}: {_gb(parts.weights)} for weights that are "
        f"streamed, {_gb(parts.activations)} for activations, {_gb(parts.checkpoint)} for the LoRA "
        f"and the optimizer while they are saved, {_gb(parts.batch)} for a batch. Caches are read "
        "from disk."
    ]
    if plan.streaming != "disk":
        lines.append(f"Off the device, the weights take {_gb(plan.weights)} of system memory.")
    lines += copies
    if needed <= room:
        return [*lines, f"System memory is enough: {_gb(room)} are free for it."]
    lines.append(
        f"System memory is short: {_gb(needed)} are needed, and {_gb(room)} are free for it. The "
        "system would swap, or end the program."
    )
    return [*lines, *_what_needs_less_ram(plan, free_bytes, ram)]


def _room(plan: Plan, ram: SystemMemory) -> int:
    """System memory for a training: what is free, and where its weights lie now. The host's own
    copy is there already, so it takes nothing of either."""
    return ram.free + (plan.in_ram or 0)


def what_would_fit(plan: Plan, free_bytes: int, ram: SystemMemory) -> list[str]:
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
    room = Room(free_bytes, _room(plan, ram))
    return [first, *_fitting(plan, room, lambda changed: changed.least_bytes)]


def _what_needs_less_ram(plan: Plan, free_bytes: int, ram: SystemMemory) -> list[str]:
    room = Room(free_bytes, _room(plan, ram))
    return _fitting(plan, room, lambda changed: changed.ram_needed(free_bytes))


@dataclass(frozen=True)
class Room:
    """Bytes for a training, on the device and of system memory."""

    device: int
    ram: int

    def takes(self, plan: Plan) -> bool:
        if plan.least_bytes > self.device:
            return False
        return not plan.has_own_memory or plan.ram_needed(self.device) <= self.ram


def _fitting(plan: Plan, room: Room, size: Callable[[Plan], int]) -> list[str]:
    """Sentences for single changes with which the training fits, and the `size` that it has then.
    Of the formats only the most exact is named."""
    fitting = [change for change in _smaller(plan) if room.takes(change[0])]
    fitting += islice((change for change in _formats(plan) if room.takes(change[0])), 1)
    nothing_fits = _NOTHING_FITS_FROM_CORE if plan.is_from_core else _NOTHING_FITS
    return [say(_gb(size(changed))) for changed, say in fitting] or [nothing_fits]


_Change = tuple[Plan, Callable[[str], str]]
"""Another plan, and the sentence for when it fits, given its size."""


def _formats(plan: Plan) -> Iterator[_Change]:
    products = plan.workload.speed.products
    for name in (*auto_formats(), "int2"):
        if not has_products(products, plan.device, name):
            continue
        if plan.is_from_core:
            sentence = partial(_say_loaded, name)
        else:
            sentence = partial(_say_format, name)
        yield plan.with_format(name), sentence


def _say_format(name: str, size: str) -> str:
    return f"With format {name} of Load Quantized FLUX {size} are enough."


def _say_loaded(name: str, size: str) -> str:
    return f"Loaded by Load Quantized FLUX in the format {name}, {size} are enough."


def _smaller(plan: Plan) -> Iterator[_Change]:
    """Single changes that take less of one memory or the other, beside another format."""
    is_on_cpu, workload = plan.device.type == "cpu", plan.workload
    if plan.streaming != "disk" and not plan.is_from_core:
        streaming = "disk" if is_on_cpu or plan.can_stream else "auto"
        yield (
            plan.with_streaming(streaming),
            lambda size: (
                f"With block_streaming {streaming} of Load Quantized FLUX {size} are enough."
            ),
        )
    if not workload.gradient_checkpointing:
        yield (
            plan.with_workload(gradient_checkpointing=True),
            lambda size: f"With gradient_checkpointing {size} are enough.",
        )
    if not is_on_cpu and not workload.activations_in_ram:
        yield (
            plan.with_workload(activations_in_ram=True),
            lambda size: f"With activations_in_ram {size} are enough.",
        )
    if not is_on_cpu and workload.activations_in_ram:
        yield (
            plan.with_workload(activations_in_ram=False),
            lambda size: f"Without activations_in_ram {size} are enough.",
        )
    if workload.batch_size > 1:
        yield (
            plan.with_workload(batch_size=1),
            lambda size: f"With a batch size of 1 {size} are enough.",
        )
    recipe, lora = LoraSettings(), workload.lora
    if lora.rank > recipe.rank and not lora.start_from:
        yield (
            plan.with_workload(lora=replace(lora, rank=recipe.rank, rank_patterns="")),
            lambda size: f"With a rank of {recipe.rank} {size} are enough.",
        )
    if (lora.patterns or lora.targets != recipe.targets) and not lora.start_from:
        usual = replace(lora, targets=recipe.targets, patterns="", blocks="", rank_patterns="")
        yield (
            plan.with_workload(lora=usual),
            lambda size: f"With the targets {recipe.targets} {size} are enough.",
        )
    width, height = _half(workload.width), _half(workload.height)
    yield (
        plan.with_workload(width=width, height=height),
        lambda size: f"With pictures of {width}x{height} {size} are enough.",
    )


def _half(pixels: int) -> int:
    """Half of a side, a multiple of 16."""
    return max(16, pixels // 32 * 16)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
