"""How much memory a training takes.

Nothing is added up by hand: the network itself, its adapters and its loss are run once forward and
backward on tensors that have a shape and no bytes, and the bytes that would be alive are counted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .adapters import attach_lora
from .blocks import BlockRunner
from .flow import add_noise, flow_loss
from .flux import (
    LATENT_CHANNELS,
    FluxConfig,
    build_transformer,
    empty_transformer,
    is_block_matrix,
    multiply_in_8_bits,
    norm_sources,
    original_linears,
    velocity,
)
from .lora_settings import LoraSettings
from .lora_targets import in_all_blocks, num_numbers, num_parameters, of_network
from .optimizer_memory import optimizer_bytes
from .optimizer_settings import OptimizerSettings
from .optimizers import cast_parameters
from .packed_weight import PackedWeight
from .segments import Run, runs_of, segments_in, segments_of, shortened
from .speed_settings import SpeedSettings
from .store import WeightStore

_USABLE = 0.9
"""Of free memory, the part that activations may take: allocators leave gaps."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one micro-step of a training computes."""

    width: int
    height: int
    """Pixels of the largest picture, multiples of 16."""
    prompt_length: int
    """T5 tokens."""
    batch_size: int
    lora: LoraSettings
    dtype: torch.dtype
    """What the network computes in."""
    gradient_checkpointing: bool
    accumulates: bool
    """Whether gradients of earlier micro-steps are there meanwhile."""
    activations_in_ram: bool = False
    """Whether what backward needs of the forward pass leaves the device."""
    frozen_bytes: int = 0
    """What LoRAs of the base model and of its training take."""
    reference_width: int = 0
    """Pixels of the reference picture that is seen beside the picture; 0 for none."""
    reference_height: int = 0
    is_masked: bool = False
    """Whether padding of the texts is hidden, which keeps attention from its leanest way."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    speed: SpeedSettings = field(default_factory=SpeedSettings)
    kept_blocks: int = 0
    """With selective checkpointing, how many blocks keep their activations."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes while training, by what they are for: on the device, then in system memory."""

    weights: int
    adapters: int
    """The LoRA, its gradients if they are kept between micro-steps, its average, and LoRAs of the
    base model."""
    optimizer: int
    activations: int
    """The most that is alive at once in forward and backward, beside all else."""
    batch: int
    """Latents and prompt embeddings of one batch."""
    saved: int
    """System memory for what leaves the device until backward."""
    checkpoint: int
    """System memory for the LoRA and the optimizer's state while they are written, and for a state
    that is paged."""

    @property
    def total(self) -> int:
        return self.weights + self.beside_weights

    @property
    def beside_weights(self) -> int:
        return self.adapters + self.optimizer + self.activations + self.batch


@functools.lru_cache(maxsize=64)  # a second or two each; asked again after every sampling
def estimate_training(config: FluxConfig, format: str, workload: Workload) -> MemoryEstimate:
    """The memory of training a LoRA on this network with its block matrices in `format`.

    Blocks that are run in the same way are alike, so small networks tell what each further one of
    them adds. Tokens that masks keep out of TREAD's routes are not counted.

    Raises:
        ValueError: if the network cannot be trained.
    """
    segments = segments_of(
        workload.speed,
        config.num_blocks,
        gradient_checkpointing=workload.gradient_checkpointing,
        kept_blocks=workload.kept_blocks,
    )
    runs, ranks = runs_of(segments, config.depth), in_all_blocks(config, workload.lora)
    probe = functools.partial(_probe, config, format, replace(workload, kept_blocks=0))
    first = probe(shortened(runs))
    furthers = [
        (run.count - 1, probe(shortened(runs, but=number)))
        for number, run in enumerate(runs)
        if run.count > 1
    ]

    def whole(name: str) -> int:
        one = getattr(first, name)
        return one + sum(count * (getattr(two, name) - one) for count, two in furthers)

    names = [field.name for field in dataclasses.fields(MemoryEstimate)]
    values = {name: whole(name) for name in names}
    everywhere = num_numbers(config, of_network(ranks, config), workload.lora)
    share = num_parameters(config, workload.lora) / everywhere
    for name in ("adapters", "optimizer", "checkpoint"):
        values[name] = math.ceil(values[name] * share)
    values["adapters"] += workload.frozen_bytes
    return MemoryEstimate(**values)


def most_kept_blocks(config: FluxConfig, format: str, workload: Workload, room: float) -> int:
    """With selective checkpointing, how many blocks can keep their activations where `room` bytes
    are free beside the weights; 0 without."""
    if not (workload.gradient_checkpointing and workload.speed.checkpointing == "selective"):
        return 0

    def needed(kept: int) -> int:
        kept_some = replace(workload, kept_blocks=kept)
        return estimate_training(config, format, kept_some).beside_weights

    return bisect_right(range(1, config.num_blocks + 1), room * _USABLE, key=needed)


def store_bytes(config: FluxConfig, format: str) -> int:
    """Bytes of a network's weights with its block matrices in `format`."""
    return empty_store(config, format).num_bytes


def empty_store(config: FluxConfig, format: str) -> WeightStore:
    """A store of this network whose tensors have shapes and no bytes."""
    return _shapes_only(config, format, FakeTensorMode())


def streamed_bytes(config: FluxConfig, format: str) -> int:
    """Bytes of the weights that are on the device at once when every block is streamed."""
    store = _shapes_only(config, format, FakeTensorMode())
    store.streaming = "ram"
    return store.wanted_bytes


@functools.lru_cache(maxsize=64)
def placed_bytes(config: FluxConfig, format: str, budget: float) -> tuple[int, int]:
    """Bytes of the weights on a device with `budget` bytes for them, and of those beside it."""
    return _shapes_only(config, format, FakeTensorMode()).split(budget)


@functools.lru_cache(maxsize=64)
def _probe(
    config: FluxConfig, format: str, workload: Workload, runs: tuple[Run, ...]
) -> MemoryEstimate:
    """Of a network with these blocks, and else as in `config`."""
    depth, depth_single = (sum(run.count * run.blocks[kind] for run in runs) for kind in (0, 1))
    # In every block of theirs, as if all learned: of a LoRA on some blocks, activations are less.
    ranks = in_all_blocks(config, workload.lora)
    config = replace(config, depth=depth, depth_single=depth_single)
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)
    store = _shapes_only(config, format, shapes_only)
    transformer = build_transformer(store, config, workload.dtype).train()
    if workload.speed.products == "8bit":
        multiply_in_8_bits(transformer)
    lora = attach_lora(transformer, workload.lora, seed=0, ranks=of_network(ranks, config))
    cast_parameters(workload.optimizer, lora.parameters.values())
    optimizer = optimizer_bytes(workload.optimizer, lora.parameters)
    blocks = BlockRunner(transformer, segments_in(runs))
    # A host may ask from inside its inference mode.
    with shapes_only, torch.inference_mode(False), torch.enable_grad():
        parameters = _without_bytes(transformer)
        gradients = [torch.empty_like(p) for p in parameters] if workload.accumulates else []
        for parameter, gradient in zip(parameters, gradients, strict=False):
            parameter.grad = gradient
        batch = _batch(config, workload)
        saved: list[int] = []
        with _LiveBytes([*store.tensors(), *parameters, *gradients, *batch.values()]) as live:
            elsewhere = _saved_elsewhere(saved) if workload.activations_in_ram else nullcontext()
            with elsewhere, blocks.routed(torch.Generator(), forced=None):
                loss = _loss(transformer, batch, workload.dtype)
            loss.backward()
    trained = sum(parameter.nbytes for parameter in parameters)
    # Buffers: what a LoRA remembers of its start.
    kept = sum(tensor.nbytes for tensor in transformer.buffers())
    average = trained if workload.optimizer.ema_decay else 0
    return MemoryEstimate(
        weights=store.num_bytes,
        adapters=trained + kept + sum(gradient.nbytes for gradient in gradients) + average,
        optimizer=optimizer.device,
        activations=live.peak,
        batch=sum(tensor.nbytes for tensor in batch.values()),
        saved=sum(map(pinned_bytes, saved)),
        checkpoint=trained + kept + average + optimizer.device + 2 * optimizer.paged,
    )


def _saved_elsewhere(sizes: list[int]) -> saved_tensors_hooks:
    """As torch's save_on_cpu, where a CPU would keep the tensors that it is given; the bytes of
    each copy are added to `sizes`."""

    def pack(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
        sizes.append(tensor.nbytes)
        return tensor.size(), tensor.stride(), tensor.dtype

    return saved_tensors_hooks(
        pack, lambda saved: torch.empty_strided(saved[0], saved[1], dtype=saved[2])
    )


def pinned_bytes(num_bytes: int) -> int:
    """What torch's allocator of pinned memory takes for a tensor: a power of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def _shapes_only(config: FluxConfig, format: str, shapes_only: FakeTensorMode) -> WeightStore:
    """A store of this network whose tensors have no bytes."""
    network = empty_transformer(config)
    packed: dict[str, PackedWeight] = {}
    plain: dict[str, Tensor] = {}
    with shapes_only:
        for name, parts in original_linears(config).items():
            linears: list[Any] = [network.get_submodule(part) for part in parts]
            rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
            matrix = torch.empty(rows, columns, dtype=torch.bfloat16)
            kept = format if is_block_matrix(f"{name}.weight", matrix.shape) else "bf16"
            packed[f"{name}.weight"] = PackedWeight.pack(matrix, kept)
            plain[f"{name}.bias"] = torch.empty(rows, dtype=torch.bfloat16)
        for ours, theirs in norm_sources(config).items():
            norm: Any = network.get_submodule(ours)
            plain[f"{theirs}.scale"] = torch.empty(norm.weight.shape, dtype=torch.bfloat16)
        return WeightStore(packed, plain)


def _without_bytes(network: nn.Module) -> list[nn.Parameter]:
    """Replace every parameter by one that has only a shape; returns those that are trained."""
    trained = []
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape_only = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
            setattr(module, name, shape_only)
            if parameter.requires_grad:
                trained.append(shape_only)
    return trained


def _batch(config: FluxConfig, workload: Workload) -> dict[str, Tensor]:
    count, latent_size = workload.batch_size, (workload.height // 8, workload.width // 8)
    batch = {
        "latents": torch.empty(count, LATENT_CHANNELS, *latent_size),
        "noise": torch.empty(count, LATENT_CHANNELS, *latent_size),
        "sigma": torch.empty(count),
        "prompt_embeds": torch.empty(count, workload.prompt_length, config.context_dim),
        "pooled": torch.empty(count, config.vector_dim),
    }
    if workload.reference_width:
        size = workload.reference_height // 8, workload.reference_width // 8
        batch["reference"] = torch.empty(count, LATENT_CHANNELS, *size)
    if workload.is_masked:
        batch["text_mask"] = torch.empty(count, workload.prompt_length)
    return batch


def _loss(transformer: Any, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    prediction = velocity(
        transformer,
        add_noise(batch["latents"], batch["noise"], batch["sigma"]).to(dtype),
        sigma=batch["sigma"],
        prompt_embeds=batch["prompt_embeds"],
        pooled=batch["pooled"],
        guidance=1.0,
        text_mask=batch.get("text_mask"),
        reference=batch.get("reference"),
    )
    return flow_loss(prediction, batch["latents"], batch["noise"]).mean()


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation gives, until it is freed."""

    def __init__(self, before: list[Tensor]) -> None:
        """`before` is what was there before, and does not count."""
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self._change(storage.nbytes())
            weakref.finalize(storage, self._change, -storage.nbytes())

    def _change(self, num_bytes: int) -> None:
        self._now += num_bytes
        self.peak = max(self.peak, self._now)
