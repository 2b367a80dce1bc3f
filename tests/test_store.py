"""Packed weights: what they compute, compared with dense matrices and with bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from allocated import AllocatedBytes
from atelier.trainers import formats, packages
from atelier.trainers.adapters import attach_lora
from atelier.trainers.flux import build_transformer, recompute_blocks, velocity
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.packed_weight import PackedWeight
from atelier.trainers.store import WeightStore
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from dense import ROUND_TRIPS
from flux_files import write_flux
from torch.nn import functional as F

ROWS, COLUMNS = 96, 128
KEPT = {
    "bf16": (16, 0.0),
    "fp8": (8 + 16 / COLUMNS, 0.027),
    "int8": (8 + 16 / COLUMNS, 0.008),
    "nf4": (4.25, 0.094),
    "fp4": (4.25, 0.125),
    "int4": (4.5, 0.088),
    "int2": (3, 0.31),
}
"""Bits per weight, and the largest relative error on Gaussian weights."""
SLICES = [slice(None), slice(0, 32), slice(32, 64), slice(7, 80)]


def matrix(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=list(FORMATS))
def format(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.fixture
def loaded(format: str, flux_file: Path) -> LoadedFlux:
    return load_flux(flux_file, format=format)


def small_store(format: str) -> WeightStore:
    packed = {name: PackedWeight.pack(matrix(seed), format) for seed, name in enumerate("ab")}
    return WeightStore(packed, {"a.bias": torch.randn(ROWS, dtype=torch.bfloat16)})


def test_a_packed_weight_holds_what_the_format_keeps(format: str) -> None:
    packed = PackedWeight.pack(matrix(), format)
    assert torch.equal(packed.dequantize(torch.float32), ROUND_TRIPS[format](matrix()))


def test_linear_is_that_of_the_dense_matrix(format: str) -> None:
    packed, bias, x = PackedWeight.pack(matrix(), format), torch.randn(ROWS), torch.randn(5, 128)
    expected = F.linear(x, ROUND_TRIPS[format](matrix()), bias)
    torch.testing.assert_close(packed.linear(x, bias), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", SLICES, ids=str)
def test_rows_of_a_packed_weight_equal_those_of_the_whole(format: str, rows: slice) -> None:
    packed = PackedWeight.pack(matrix(), format)
    whole = packed.dequantize(torch.float32)
    assert torch.equal(packed.dequantize(torch.float32, rows), whole[rows])


@pytest.mark.parametrize("rows", SLICES, ids=str)
def test_the_gradient_is_that_of_the_dense_matrix(format: str, rows: slice) -> None:
    packed = PackedWeight.pack(matrix(), format)
    x, dense_x = (torch.ones(2, 5, COLUMNS, requires_grad=True) for _ in range(2))
    F.linear(dense_x, ROUND_TRIPS[format](matrix())[rows]).sin().sum().backward()
    packed.linear(x, rows=rows).sin().sum().backward()
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_has_the_dtype_of_its_input(format: str, dtype: torch.dtype) -> None:
    packed = PackedWeight.pack(matrix(), format)
    x = torch.randn(3, COLUMNS, dtype=dtype, requires_grad=True)
    y = packed.linear(x, torch.zeros(ROWS, dtype=torch.bfloat16))
    y.sum().backward()
    assert x.grad is not None
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)


def relative_error(packed: PackedWeight, weights: torch.Tensor) -> float:
    error = packed.dequantize(torch.float32) - weights.float()
    return float(error.norm() / weights.float().norm())


def test_a_format_takes_its_bits_and_makes_no_larger_an_error(format: str) -> None:
    bits, largest_error = KEPT[format]
    packed = PackedWeight.pack(matrix(), format)
    assert packed.num_bytes == ROWS * COLUMNS * bits / 8
    assert relative_error(packed, matrix()) <= largest_error


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_rows_of_one_value_come_back(format: str, value: float) -> None:
    """Their range is zero, and no scale may be."""
    weights = torch.full((4, COLUMNS), value)
    found = PackedWeight.pack(weights, format).dequantize(torch.float32)
    # 448 * bf16(0.5 / 448), and the like: half a unit in the last place of bf16.
    torch.testing.assert_close(found, weights, rtol=2**-8, atol=0)


def test_small_weights_keep_their_precision_in_fp16(format: str) -> None:
    """The scales of whole rows lie below fp16's range."""
    packed = PackedWeight.pack(1e-4 * matrix(), format)
    expected = packed.dequantize(torch.float32)
    found = packed.dequantize(torch.float16).float()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=6e-7)


def heavy_tails() -> torch.Tensor:
    normal = matrix(2).float()
    return (normal / matrix(1).float().abs().clamp_min(0.1)).bfloat16()


def min_max_round_trip(weights: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Levels from the smallest to the largest weight of a group, as quanto and torchao take."""
    grouped = weights.double().view(ROWS, -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return (((grouped - low) / scale).round() * scale + low).view(ROWS, -1)


@pytest.mark.parametrize("weights", [matrix(), heavy_tails()], ids=["gaussian", "heavy tails"])
@pytest.mark.parametrize(
    ("bits", "group", "part"), [(4, 64, 0.96), (2, 32, 0.8)], ids=["int4", "int2"]
)
def test_groups_lose_less_than_by_their_smallest_and_largest_weight(
    weights: torch.Tensor, bits: int, group: int, part: float
) -> None:
    theirs = (min_max_round_trip(weights, bits, group) - weights).norm() / weights.double().norm()
    ours = relative_error(PackedWeight.pack(weights, f"int{bits}"), weights)
    assert ours <= part * float(theirs)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_are_those_of_bitsandbytes(kind: str) -> None:
    packed = PackedWeight.pack(matrix(), kind)
    data, state = functional.quantize_4bit(matrix(), blocksize=64, quant_type=kind)
    assert torch.equal(packed.data.flatten(), data.flatten())
    assert packed.scale is not None
    assert packed.scale.dtype == torch.bfloat16
    assert torch.equal(packed.scale.flatten(), state.absmax.bfloat16())


def test_nf4_loses_no_more_than_a_linear4bit_of_bitsandbytes() -> None:
    layer = Linear4bit(COLUMNS, ROWS, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": matrix().float()})
    layer = layer.to("cpu")  # this quantizes
    theirs = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    ours = PackedWeight.pack(matrix(), "nf4").dequantize(torch.float32)
    error_of_theirs = (theirs - matrix()).square().mean()
    assert (ours - matrix()).square().mean() <= 1.005 * error_of_theirs


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].group > 1])
def test_a_width_that_a_format_cannot_hold_is_one_sentence(name: str) -> None:
    group = FORMATS[name].group
    expected = rf"100 columns .* in {name}, .* multiple of {group}\. Load this file as bf16"
    with pytest.raises(ValueError, match=expected):
        PackedWeight.pack(matrix(columns=100), name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_looks_for_no_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A step of FLUX.1-dev asks for thousands; each would read the version from the disk."""
    packed = PackedWeight.pack(matrix(), name)

    def looked_up(package: str) -> str:
        raise AssertionError(package)

    monkeypatch.setattr(packages, "version", looked_up)
    packed.linear(torch.ones(1, COLUMNS))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("nf4", "fp4")])
@pytest.mark.usefixtures("without_bitsandbytes")
def test_formats_but_two_need_no_bitsandbytes(name: str) -> None:
    packed = PackedWeight.pack(matrix(), name)
    assert packed.linear(torch.ones(1, COLUMNS)).isfinite().all()


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.usefixtures("without_bitsandbytes")
def test_without_bitsandbytes_one_sentence_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=r"^The package bitsandbytes is missing, or does not fit"):
        PackedWeight.pack(matrix(), name)


def test_a_device_without_fp8_is_refused_before_a_byte_moves() -> None:
    """Apple's GPUs. None is needed: the weights lie on the CPU until they are moved."""
    weights = {name: PackedWeight.pack(matrix(), name) for name in ("bf16", "fp8")}
    store = WeightStore(weights, {"bias": torch.ones(3)})
    before = [tensor.data_ptr() for tensor in store.tensors()]
    for bring in (store.place, store.prepare):
        with pytest.raises(ValueError, match=r"^Apple's GPUs cannot hold weights in fp8\. "):
            bring(torch.device("mps"))
    assert store.device == torch.device("cpu")
    assert store.bytes_moved == 0
    assert [tensor.data_ptr() for tensor in store.tensors()] == before


def test_a_product_unpacks_one_slice_at_a_time(
    monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """The matrix would be 16 slices; a slice exists once, with its codes beside it."""
    monkeypatch.setattr(formats, "SLICE_BYTES", 1 << 18)
    packed = PackedWeight.pack(matrix(rows=1024, columns=1024), format)
    x = torch.ones(1, 1024, requires_grad=True)
    with AllocatedBytes() as forward:
        y = packed.linear(x, torch.zeros(1024))
    with AllocatedBytes() as backward:
        y.sum().backward()
    assert (1 << 18) <= forward.peak <= 1.6 * (1 << 18)
    assert (1 << 18) <= backward.peak <= 1.6 * (1 << 18)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_give_what_the_whole_matrix_gives(
    monkeypatch: pytest.MonkeyPatch, format: str, dtype: torch.dtype
) -> None:
    def results() -> list[torch.Tensor]:
        packed = PackedWeight.pack(matrix(), format)
        x = torch.ones(2, 5, COLUMNS, dtype=dtype, requires_grad=True)
        y = packed.linear(x, torch.arange(80.0), slice(7, 87))
        y.backward(torch.arange(80.0).cos().to(dtype).expand_as(y))
        scale = [packed.scale] if packed.scale is not None else []
        return [packed.data.view(torch.uint8), *scale, y, x.grad]  # pyright: ignore

    whole = results()
    monkeypatch.setattr(formats, "SLICE_BYTES", 15 * COLUMNS * 4)
    *stored, y, gradient = results()
    assert all(torch.equal(a, b) for a, b in zip(stored, whole, strict=False))
    # Values are about 10, and the products of slices are rounded one by one.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(y, whole[-2], rtol=tolerance / 10, atol=tolerance)
    torch.testing.assert_close(gradient, whole[-1], rtol=tolerance / 10, atol=tolerance)


def test_the_bytes_survive_forward_and_backward(format: str) -> None:
    store = small_store(format)
    before = store.content_hash()
    x = torch.randn(5, COLUMNS, requires_grad=True)
    for name in "ab":
        store.packed[name].linear(x, store.plain["a.bias"]).sum().backward()
    assert store.content_hash() == before


def test_the_hash_follows_every_byte_of_every_tensor(format: str) -> None:
    store = small_store(format)
    tensors = [store.plain["a.bias"]]
    for weight in store.packed.values():
        tensors += [weight.data] if weight.scale is None else [weight.data, weight.scale]
    hashes = {store.content_hash()}
    for tensor in tensors:
        tensor.view(torch.uint8).view(-1)[-1] ^= 1
        hashes.add(store.content_hash())
    assert len(hashes) == len(tensors) + 1


def test_a_store_on_its_device_moves_nothing(format: str) -> None:
    store = small_store(format)
    pointers = [weight.data.data_ptr() for weight in store.packed.values()]
    store.place("cpu")
    assert [weight.data.data_ptr() for weight in store.packed.values()] == pointers
    assert store.bytes_moved == 0


def test_a_placed_store_is_wholly_on_the_device_and_counts_its_bytes(format: str) -> None:
    store = small_store(format)
    size = store.num_bytes
    store.place("meta")  # a device that every machine has
    tensors = [*store.plain.values()]
    for weight in store.packed.values():
        tensors += [weight.data] if weight.scale is None else [weight.data, weight.scale]
    assert {tensor.device.type for tensor in [*tensors, store]} == {"meta"}
    assert store.bytes_moved == size


def gradients(loaded: LoadedFlux, *, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Gradients of a LoRA after one backward pass through the training face."""
    transformer = build_transformer(loaded.store, loaded.config, torch.float32)
    lora = attach_lora(transformer, LoraSettings(targets="all+ffs"), seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    transformer.train()
    if checkpointing:
        recompute_blocks(transformer)
    output = velocity(
        transformer,
        torch.randn(1, 16, 4, 4, generator=generator),
        sigma=torch.tensor([0.5]),
        prompt_embeds=torch.randn(1, 6, loaded.config.context_dim, generator=generator),
        pooled=torch.randn(1, loaded.config.vector_dim, generator=generator),
        guidance=1.0,
    )
    output.square().mean().backward()
    return {name: parameter.grad for name, parameter in lora.parameters.items()}  # pyright: ignore


def move_in_inference_mode(store: WeightStore) -> None:
    """What a host does that moves modules between devices while it runs a node."""
    with torch.inference_mode():
        for weight in store.packed.values():
            weight.data = weight.data.clone()
            weight.scale = weight.scale.clone() if weight.scale is not None else None
        store.plain = {name: tensor.clone() for name, tensor in store.plain.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_store_moved_in_inference_mode_trains_with_the_same_gradients(
    loaded: LoadedFlux, checkpointing: bool
) -> None:
    expected = gradients(loaded, checkpointing=False)
    move_in_inference_mode(loaded.store)
    for weight in loaded.store.packed.values():
        assert weight.data.is_inference()
        assert weight.scale is None or weight.scale.is_inference()
    found = gradients(loaded, checkpointing=checkpointing)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
