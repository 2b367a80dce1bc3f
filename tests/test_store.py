"""Packed weights: what they compute, compared with dense matrices and with bitsandbytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from atelier.trainers.adapters import attach_lora
from atelier.trainers.config import LoraSettings
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.store import FORMATS, PackedWeight, WeightStore
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from dense import ROUND_TRIPS
from flux_files import write_flux
from torch.nn import functional as F

ROWS, COLUMNS = 96, 128
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


def test_nf4_bytes_are_those_of_bitsandbytes() -> None:
    packed = PackedWeight.pack(matrix(), "nf4")
    data, state = functional.quantize_4bit(matrix(), blocksize=64, quant_type="nf4")
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


def test_nf4_takes_four_and_a_quarter_bits_per_weight() -> None:
    assert PackedWeight.pack(matrix(), "nf4").num_bytes == ROWS * COLUMNS * 4.25 / 8


def test_a_width_that_nf4_cannot_hold_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"100 columns .* multiple of 64\. Load this file as bf16"):
        PackedWeight.pack(matrix(columns=100), "nf4")


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
        transformer.enable_gradient_checkpointing()
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
