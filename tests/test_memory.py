"""What a training is said to take, against what the allocator and bitsandbytes really take."""

import json
import math
from pathlib import Path

import pytest
import torch
from allocated import profiled
from atelier.trainers.adapters import attach_lora
from atelier.trainers.batches import BatchOrder
from atelier.trainers.blocks import BlockRunner
from atelier.trainers.config import JobSettings, TrainSettings
from atelier.trainers.flow import flow_loss
from atelier.trainers.flux import (
    FluxConfig,
    build_transformer,
    multiply_in_8_bits,
    velocity,
)
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import (
    Workload,
    estimate_training,
    store_bytes,
    streamed_bytes,
)
from atelier.trainers.optimizer_memory import optimizer_bytes
from atelier.trainers.optimizer_settings import OPTIMIZERS, PAGED, OptimizerSettings
from atelier.trainers.optimizers import cast_parameters, make_optimizer
from atelier.trainers.segments import segments_of
from atelier.trainers.speed_settings import SpeedSettings, routes_from_text
from atelier.trainers.step import TrainState, optimizer_step
from flux_files import flux_shapes, write_flux
from pack import load_module
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from training import training_data

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "assets" / "nano" / "nano-flux.safetensors"
SIZES = {"width": 256, "depth": 3, "depth_single": 4, "context": 128, "vector": 64}
CONFIG = FluxConfig.from_shapes(flux_shapes(**SIZES))
ROUTES = routes_from_text("0.5: 1 to -2")


def workload(**changes: object) -> Workload:
    settings = {
        "width": 256,
        "height": 192,
        "prompt_length": 77,
        "batch_size": 2,
        "lora": LoraSettings(rank=8),
        "dtype": torch.bfloat16,
        "gradient_checkpointing": True,
        "accumulates": False,
    }
    return Workload(**{**settings, **changes})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    write_flux(path, **SIZES)
    return path


class Training:
    """A network with a LoRA, and the loss of one batch of noise."""

    def __init__(self, base: LoadedFlux, work: Workload) -> None:
        self.config, self.work = base.config, work
        self.transformer = build_transformer(base.store, base.config, work.dtype).train()
        if work.speed.products == "8bit":
            multiply_in_8_bits(self.transformer)
        self.lora = attach_lora(self.transformer, work.lora, seed=0)
        segments = segments_of(
            work.speed,
            base.config.num_blocks,
            gradient_checkpointing=work.gradient_checkpointing,
            kept_blocks=work.kept_blocks,
        )
        self.blocks = BlockRunner(self.transformer, segments)

    def loss(self) -> Tensor:
        work, count = self.work, self.work.batch_size
        latents = torch.randn(count, 16, work.height // 8, work.width // 8)
        noise, sigma = torch.randn(latents.shape), torch.rand(count)
        with self.blocks.routed(torch.Generator(), forced=None):
            prediction = velocity(
                self.transformer,
                latents.to(work.dtype),
                sigma=sigma,
                prompt_embeds=torch.randn(count, work.prompt_length, self.config.context_dim),
                pooled=torch.randn(count, self.config.vector_dim),
                guidance=1.0,
            )
        return flow_loss(prediction, latents, noise).mean()


@pytest.mark.parametrize("format", FORMATS)
def test_the_weights_are_those_of_the_store(file: Path, format: str) -> None:
    assert store_bytes(CONFIG, format) == load_flux(file, format=format).store.num_bytes


def test_flux_dev_in_nf4_takes_what_its_shapes_say() -> None:
    shapes = flux_shapes(width=3072, depth=19, depth_single=38, context=4096, vector=768)
    half_a_byte_and_a_scale, bf16 = 0.5 + 2 / 64, 2
    wanted = 0
    for name, shape in shapes.items():
        packed = len(shape) == 2 and "blocks" in name
        wanted += torch.Size(shape).numel() * (half_a_byte_and_a_scale if packed else bf16)
    assert store_bytes(FluxConfig.from_shapes(shapes), "nf4") == wanted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": False, "dtype": torch.float32},
        {"lora": LoraSettings(rank=32, targets="all+ffs")},
        {"speed": SpeedSettings(checkpointing="interval", tread=ROUTES)},
        {"speed": SpeedSettings(checkpointing="selective"), "kept_blocks": 5},
        {"speed": SpeedSettings(tread=ROUTES), "gradient_checkpointing": False},
    ],
    ids=str,
)
def test_the_peak_is_that_of_the_allocator(
    file: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    compare_peaks(load_flux(file, format="nf4"), workload(**changes), tmp_path)


@pytest.mark.parametrize("format", ["int8", "bf16"])
def test_the_peak_of_products_in_8_bits_is_that_of_the_allocator(
    file: Path, tmp_path: Path, format: str
) -> None:
    work = workload(speed=SpeedSettings(products="8bit"))
    compare_peaks(load_flux(file, format=format), work, tmp_path)


def compare_peaks(base: LoadedFlux, work: Workload, folder: Path) -> None:
    network = Training(base, work)

    def step() -> None:
        network.loss().backward()
        for parameter in network.lora.parameters.values():
            parameter.grad = None

    step()  # what is made once
    peak = profiled(step, folder / "trace.json").peak
    estimate = estimate_training(base.config, base.format, work)
    predicted = estimate.activations + estimate.batch  # the rest is there when the profile begins
    assert predicted == pytest.approx(peak, rel=0.05)


def test_activations_in_ram_leave_the_device() -> None:
    """With checkpointing, at least the inputs of all blocks but two: their image tokens."""
    estimates = [
        estimate_training(CONFIG, "nf4", workload(activations_in_ram=is_on)).activations
        for is_on in (False, True)
    ]
    inputs = (SIZES["depth"] + SIZES["depth_single"] - 2) * 2 * (256 * 192 // 256) * 256 * 2
    assert inputs <= estimates[0] - estimates[1] < estimates[0] * 0.9


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all"])
def test_what_leaves_the_device_is_what_torch_packs(checkpointing: bool) -> None:
    """Its copies on the nano model, of which pinned memory takes powers of two."""
    work = workload(activations_in_ram=True, gradient_checkpointing=checkpointing)
    base = load_flux(NANO, format="nf4")
    copies = []
    saver = save_on_cpu(pin_memory=True)
    pack = saver.pack_hook

    def counted(tensor: Tensor) -> tuple[torch.device, Tensor]:
        device, copy = pack(tensor)
        copies.append(copy.untyped_storage().nbytes())
        return device, copy

    saver.pack_hook = counted
    network = Training(base, work)
    with saver:
        loss = network.loss()
    pinned = sum(2 ** math.ceil(math.log2(size)) for size in copies if size)
    assert estimate_training(base.config, "nf4", work).saved == pytest.approx(pinned, rel=0.02)
    assert sum(copies) > 1e6
    loss.backward()


def test_a_checkpoint_takes_the_lora_and_the_state_of_the_optimizer(tmp_path: Path) -> None:
    """As tensors of the loop's own checkpoint; what is not a parameter's is a few tables."""
    base = load_flux(NANO, format="nf4")
    job = JobSettings(lora=LoraSettings(rank=8), train=TrainSettings(gradient_accumulation=1))
    data = training_data(
        tmp_path, text_tokens=77, widths=(base.config.context_dim, base.config.vector_dim)
    )
    state = TrainState(base, job)
    order = BatchOrder(data.latents.subsets, batch_size=1, seed=0)
    optimizer_step(state, 0, order, data)
    checkpoint = state.checkpoint(1)
    tables = {name for name in checkpoint.optimizer if "qmap" in name}
    taken = [*checkpoint.adapter.values()]
    taken += [t for name, t in checkpoint.optimizer.items() if name not in tables]
    predicted = estimate_training(base.config, "nf4", workload()).checkpoint
    assert predicted == pytest.approx(sum(t.nbytes for t in taken), rel=0.01)


def test_streaming_leaves_two_blocks_and_what_is_outside_of_blocks() -> None:
    shapes = flux_shapes(**SIZES)
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}
    in_blocks = {n for n, s in shapes.items() if "_blocks." in n and len(s) == 2}
    largest = sum(sizes[name] for name in in_blocks if name.startswith("double_blocks.0."))
    outside = sum(size for name, size in sizes.items() if name not in in_blocks)
    assert streamed_bytes(CONFIG, "bf16") == outside + 2 * largest


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_takes_what_it_allocates(name: str) -> None:
    """Several steps of all parameters together, with other values than the estimate has."""
    settings = OptimizerSettings(optimizer=name)
    # One below bitsandbytes' threshold of 4,096 elements, one at it, one that is no multiple of a
    # group, and a B matrix, which begins at 0.
    sizes = {"a": (63, 65), "b": (64, 64), "c": (100, 77), "d.lora_B.weight": (320, 320)}
    generator = torch.Generator().manual_seed(0)
    parameters = {
        key: torch.nn.Parameter(torch.randn(size, generator=generator) * (key < "d"))
        for key, size in sizes.items()
    }
    cast_parameters(settings, parameters.values())
    optimizer = make_optimizer(settings, parameters, 1e-3)
    for _ in range(2):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for parameter in parameters.values()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor) and not key.startswith("qmap")
    }
    estimated = optimizer_bytes(settings, parameters)
    assert sum(estimated) == pytest.approx(sum(storages.values()), rel=1e-3)
    assert bool(estimated.paged) == (name in PAGED)


def test_adamw8bit_takes_two_bytes_and_two_scales_for_256_values() -> None:
    parameters = {"a": torch.empty(4096, 16), "b": torch.empty(100, 77), "c": torch.empty(63, 65)}
    wanted = sum(2 * p.numel() + 8 * math.ceil(p.numel() / 256) for p in parameters.values())
    wanted += 63 * 65 * 8 - 2 * 63 * 65 - 8 * 16  # it has 32 bits below 4,096 values
    assert optimizer_bytes(OptimizerSettings(), parameters) == (wanted, 0)


def test_a_paged_state_is_counted_as_system_memory_and_an_average_as_a_second_lora() -> None:
    lora = LoraSettings(rank=512)
    plain, paged, averaged, small = (
        estimate_training(
            CONFIG, "nf4", workload(lora=lora, optimizer=OptimizerSettings(**changes))
        )
        for changes in (
            {},
            {"optimizer": "adamw8bit_paged"},
            {"ema_decay": 0.9},
            {"optimizer": "adamw_bf16"},
        )
    )
    moved = plain.optimizer - paged.optimizer
    assert moved > 0.9 * plain.optimizer
    assert paged.checkpoint == plain.checkpoint + moved
    assert averaged.adapters == 2 * plain.adapters
    assert averaged.checkpoint == plain.checkpoint + plain.adapters
    assert small.adapters == plain.adapters // 2


@pytest.mark.slow
def test_the_benchmark_finds_the_prediction_within_5_percent(tmp_path: Path) -> None:
    """In its small form, with the loop's own steps on the nano model."""
    benchmark = load_module("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    out = tmp_path / "memory.json"
    result = benchmark.main(["--nano", "--formats", "nf4", "--out", str(out)])
    assert result == json.loads(out.read_text(encoding="utf-8"))
    assert len(result["rows"]) == 3
    assert result["summary"]["is_within_5_percent"]
    for row in result["rows"].values():
        assert min(row["measured_gb"].values()) > 0
