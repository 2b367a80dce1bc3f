"""Products in 8 bits: against torchao, and against dense matrices rounded by other code.

torch computes them on a CPU too, only not faster; the training itself is refused there.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from atelier.trainers import formats
from atelier.trainers.adapters import attach_lora
from atelier.trainers.config import JobSettings, TrainSettings
from atelier.trainers.eight_bit import eight_bit_linear, has_products, require_products
from atelier.trainers.flux import (
    build_transformer,
    multiply_in_8_bits,
    recompute_blocks,
    velocity,
)
from atelier.trainers.formats import FORMATS
from atelier.trainers.load import LoadedFlux, load_flux
from atelier.trainers.lora_layers import DoraLinear
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.packed_weight import PackedWeight
from atelier.trainers.speed_settings import SpeedSettings
from atelier.trainers.step import TrainState
from dense import ROUND_TRIPS
from flux_files import write_flux
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.float8 import Float8LinearConfig
from torchao.float8.config import ScalingGranularity
from torchao.float8.float8_linear import Float8Linear
from torchao.float8.float8_scaling_utils import hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import LinearMMConfig

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "assets" / "nano" / "nano-flux.safetensors"
ROWS, COLUMNS, TOKENS = 96, 128, 40
KINDS = ("fp8", "int8", "bf16")
STORED = ("fp8", "int8")
LARGEST_ERROR = {"fp8": (0.03, 0.03), "int8": (0.01, 0.01), "bf16": (0.04, 0.065)}
"""Of a product of Gaussian numbers and of the gradient, relative to those with the same matrix
unpacked. Rounding to fp8 (e4m3) loses 2.6 %, once for `x`, and for a bf16 matrix twice; e5m2, in
which torchao keeps gradients, loses 5.2 %."""

ON_ALL = LoraSettings(targets="all+ffs")
REFUSED = r"^Products in 8 bits need an NVIDIA card: .* Set products of Speed Settings to dequ"


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(format: str) -> PackedWeight:
    return PackedWeight.pack(numbers(ROWS, COLUMNS).bfloat16(), format)


def both_ways(
    weight: PackedWeight, x: Tensor, bias: Tensor | None = None, rows: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """The product and the gradient of `x` for one of Gaussian numbers at its output."""
    leaf = x.clone().requires_grad_()
    y = eight_bit_linear(weight, leaf, bias, rows)
    y.backward(numbers(*y.shape, seed=3).to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def rounded_by_rows(format: str, matrix: Tensor) -> Tensor:
    """With a scale for each row, by torch's own fake quantization and by torchao."""
    if format == "int8":
        scale, zeros = matrix.abs().amax(1) / 127, torch.zeros(len(matrix), dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(matrix, scale, zeros, 0, -127, 127)
    config = LinearMMConfig()
    by_rows = {"scaling_granularity": ScalingGranularity.AXISWISE, "axiswise_dim": -1}
    codes = hp_tensor_to_float8_dynamic(matrix, torch.float8_e4m3fn, config, **by_rows)
    return codes.to_original_precision()


@pytest.mark.parametrize("format", STORED)
def test_stored_matrices_meet_tokens_rounded_each_by_itself(format: str) -> None:
    x, bias, weight = numbers(TOKENS, COLUMNS, seed=1), numbers(ROWS, seed=2), packed(format)
    y, gradient = both_ways(weight, x, bias)
    dense = ROUND_TRIPS[format](numbers(ROWS, COLUMNS).bfloat16()).double()
    wanted = rounded_by_rows(format, x).double() @ dense.T + bias
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    # Of W = diag(scale) codes: g W is (g scale) codes, and g scale is what is rounded.
    assert weight.scale is not None
    scale = weight.scale.float()
    scaled = rounded_by_rows(format, numbers(TOKENS, ROWS, seed=3) * scale.T).double()
    torch.testing.assert_close(gradient.double(), scaled @ (dense / scale), rtol=1e-5, atol=1e-5)


def test_bf16_matrices_are_multiplied_as_torchao_does() -> None:
    """Its default recipe, with its own emulation of the kernels."""
    linear = torch.nn.Linear(COLUMNS, ROWS)
    linear.weight.data = numbers(ROWS, COLUMNS).bfloat16().float()
    theirs = Float8Linear.from_float(linear, Float8LinearConfig(emulate=True))
    x = numbers(2, TOKENS, COLUMNS, seed=1)
    leaf = x.clone().requires_grad_()
    wanted = theirs(leaf)
    wanted.backward(numbers(2, TOKENS, ROWS, seed=3))
    y, gradient = both_ways(packed("bf16"), x, linear.bias.detach())
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", KINDS)
def test_the_error_is_that_of_rounding_to_8_bits(format: str, dtype: torch.dtype) -> None:
    x, weight = numbers(2, TOKENS, COLUMNS, seed=1).to(dtype), packed(format)
    y, gradient = both_ways(weight, x)
    assert (y.dtype, gradient.dtype) == (dtype, dtype)
    dense = weight.dequantize(torch.float32)
    wanted = F.linear(x.float(), dense), numbers(2, TOKENS, ROWS, seed=3) @ dense
    of_product, of_gradient = LARGEST_ERROR[format]
    assert error(y, wanted[0]) < of_product
    assert error(gradient, wanted[1]) < of_gradient


@pytest.mark.parametrize("format", KINDS)
def test_gradients_far_below_fp16_are_not_lost_in_its_scales(format: str) -> None:
    weight = PackedWeight.pack(1e-4 * numbers(ROWS, COLUMNS), format)
    x = numbers(TOKENS, COLUMNS, seed=1).half()
    _, gradient = both_ways(weight, x)
    wanted = numbers(TOKENS, ROWS, seed=3) @ weight.dequantize(torch.float32)
    assert error(gradient, wanted) < 0.07


@pytest.mark.parametrize("format", STORED)
def test_rows_are_those_of_the_whole(format: str) -> None:
    weight, x = packed(format), numbers(TOKENS, COLUMNS, seed=1)
    whole, rows = eight_bit_linear(weight, x), slice(32, 80)
    part, gradient = both_ways(weight, x, rows=rows)
    assert torch.equal(part, whole[:, rows])
    own = PackedWeight(format, weight.data[rows], weight.scale[rows], COLUMNS)  # pyright: ignore
    assert torch.equal(gradient, both_ways(own, x)[1])


@pytest.mark.parametrize("other", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_codes_of_a_file_are_multiplied_as_they_are(other: torch.dtype) -> None:
    """Also those in e5m2, and a factor in float32 that is no number of bf16."""
    data, x = numbers(ROWS, COLUMNS).to(other), numbers(TOKENS, COLUMNS, seed=1)
    y, gradient = both_ways(PackedWeight("fp8", data, torch.full((ROWS, 1), 0.3), COLUMNS), x)
    wanted = rounded_by_rows("fp8", x) @ (0.3 * data.float()).T
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    rounded = rounded_by_rows("fp8", 0.3 * numbers(TOKENS, ROWS, seed=3))
    torch.testing.assert_close(gradient, rounded @ data.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", KINDS)
def test_slices_of_the_sums_change_nothing(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    x, bias = numbers(TOKENS, COLUMNS, seed=1), numbers(ROWS, seed=2)
    whole = both_ways(packed(format), x, bias)
    monkeypatch.setattr(formats, "SLICE_BYTES", 40 * 4 * TOKENS)  # of 96 and of 128 columns, 32
    sliced = both_ways(packed(format), x, bias)
    torch.testing.assert_close(sliced, whole, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("format", KINDS)
def test_what_is_no_number_stays_none(format: str) -> None:
    """In whole numbers there is no infinity: it must come through by the scale."""
    for value in (float("inf"), float("nan")):
        x = numbers(TOKENS, COLUMNS, seed=1)
        x[5, 7] = value
        assert not eight_bit_linear(packed(format), x)[5].isfinite().any()


@pytest.mark.parametrize("format", KINDS)
def test_a_few_tokens_are_multiplied_as_ever(format: str) -> None:
    """torch._int_mm takes more than 16."""
    x, weight = numbers(16, COLUMNS, seed=1), packed(format)
    assert torch.equal(eight_bit_linear(weight, x), weight.linear(x))
    assert not torch.equal(eight_bit_linear(weight, numbers(17, COLUMNS)), weight.linear(x)[:1])


@pytest.mark.slow
@pytest.mark.parametrize("format", KINDS)
def test_compiled_the_products_are_the_same(format: str) -> None:
    """In bf16, which compiling may leave out between two operations."""
    x, weight = numbers(TOKENS, COLUMNS, seed=1).bfloat16(), packed(format)
    wanted = both_ways(weight, x)
    leaf = x.clone().requires_grad_()
    y = torch.compile(eight_bit_linear, dynamic=False, fullgraph=True)(weight, leaf)
    y.backward(numbers(TOKENS, ROWS, seed=3).bfloat16())
    assert error(y.detach(), wanted[0]) < 1e-3
    assert error(leaf.grad, wanted[1]) < 1e-3  # pyright: ignore


class Called(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Network:
    """A FLUX with a LoRA on all its layers, and its velocity of 64 image and 24 text tokens."""

    def __init__(
        self,
        base: LoadedFlux,
        *,
        is_8_bit: bool,
        checkpointing: bool = False,
        lora: LoraSettings = ON_ALL,
    ) -> None:
        self.config = base.config
        self.transformer = build_transformer(base.store, base.config, torch.float32).train()
        if is_8_bit:
            multiply_in_8_bits(self.transformer)
        self.lora = attach_lora(self.transformer, lora, seed=0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.lora.parameters.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        if checkpointing:
            recompute_blocks(self.transformer)

    def velocity(self) -> Tensor:
        return velocity(
            self.transformer,
            numbers(1, 16, 16, 16, seed=4),
            sigma=torch.tensor([0.5]),
            prompt_embeds=numbers(1, 24, self.config.context_dim, seed=5),
            pooled=numbers(1, self.config.vector_dim, seed=6),
            guidance=1.0,
        )

    def gradient(self) -> Tensor:
        """Of all parameters in one row."""
        self.velocity().square().mean().backward()
        gradients = [parameter.grad for parameter in self.lora.parameters.values()]
        return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


@pytest.fixture(scope="module")
def flux_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors")


@pytest.mark.parametrize(
    ("format", "kernel"), [("fp8", "_scaled_mm"), ("int8", "_int_mm"), ("bf16", "_scaled_mm")]
)
def test_forward_and_backward_really_multiply_in_8_bits(
    flux_file: Path, format: str, kernel: str
) -> None:
    """One double and one single block have 12 and 5 Linears beside their modulations. Backward
    goes through all of them but the six whose input no LoRA has reached: q, k and v of the first
    block, for both streams."""
    network = Network(load_flux(flux_file, format=format), is_8_bit=True)
    with Called() as forward:
        loss = network.velocity().square().mean()
    with Called() as backward:
        loss.backward()
    assert (forward.counts[kernel], backward.counts[kernel]) == (12 + 5, 12 + 5 - 6)
    others = {"_scaled_mm", "_int_mm"} - {kernel}
    assert not others & {*forward.counts, *backward.counts}


def test_without_the_setting_no_product_is_in_8_bits(flux_file: Path) -> None:
    network = Network(load_flux(flux_file, format="int8"), is_8_bit=False)
    with Called() as called:
        network.gradient()
    assert not {"_scaled_mm", "_int_mm"} & {*called.counts}


def test_the_norms_of_a_dora_are_those_of_the_matrix(flux_file: Path) -> None:
    """Also with a rank of more than the few tokens that are multiplied as ever."""
    dora = LoraSettings(rank=24, dora=True)
    norms = []
    for is_8_bit in (False, True):
        network = Network(load_flux(flux_file, format="int8"), is_8_bit=is_8_bit, lora=dora)
        layers = [m for m in network.transformer.modules() if isinstance(m, DoraLinear)]
        norms.append(torch.cat([layer.norm() for layer in layers]))
    assert len(norms[0])
    assert torch.equal(*norms)


@pytest.mark.parametrize("format", KINDS)
def test_gradients_of_a_lora_point_where_those_of_the_unpacked_weights_do(format: str) -> None:
    """On the trained nano model, through all blocks and recomputed ones."""
    base = load_flux(NANO, format=format)
    wanted = Network(base, is_8_bit=False).gradient()
    found = Network(base, is_8_bit=True, checkpointing=True).gradient()
    assert F.cosine_similarity(found, wanted, dim=0) > 0.99


@pytest.mark.parametrize("format", KINDS)
def test_a_store_moved_in_inference_mode_trains_the_same(flux_file: Path, format: str) -> None:
    """A host moves modules so, and autograd may keep nothing of what is moved."""
    base = load_flux(flux_file, format=format)
    wanted = Network(base, is_8_bit=True).gradient()
    before = base.store.content_hash()
    with torch.inference_mode():
        for weight in base.store.packed.values():
            weight.data = weight.data.clone()
            weight.scale = weight.scale.clone() if weight.scale is not None else None
    assert torch.equal(Network(base, is_8_bit=True, checkpointing=True).gradient(), wanted)
    assert base.store.content_hash() == before


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_devices_without_such_products_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        require_products("8bit", torch.device(device), "fp8")
    require_products("dequantized", torch.device(device), "fp8")


@pytest.mark.parametrize(
    ("format", "too_old", "enough"),
    [("fp8", (8, 6), (8, 9)), ("bf16", (8, 7), (12, 0)), ("int8", (7, 5), (8, 0))],
)
def test_older_cards_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    too_old: tuple[int, int],
    enough: tuple[int, int],
) -> None:
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: too_old)
    with pytest.raises(ValueError, match=rf"in {format} need .* has {too_old[0]}\.{too_old[1]}; "):
        require_products("8bit", card, format)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: enough)
    require_products("8bit", card, format)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match=r"NVIDIA"):
        require_products("8bit", card, format)


@pytest.mark.parametrize("format", sorted(FORMATS.keys() - set(KINDS)))
def test_formats_of_fewer_bits_are_refused(monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    with pytest.raises(ValueError, match=rf"^A model in {format} cannot .* fp8, int8 or bf16, or"):
        require_products("8bit", torch.device("cuda"), format)
    assert not has_products("8bit", torch.device("cuda"), format)
    assert has_products("dequantized", torch.device("cuda"), format)


def test_a_training_on_a_cpu_is_refused_in_one_sentence(flux_file: Path) -> None:
    speed = SpeedSettings(products="8bit")
    job = JobSettings(train=TrainSettings(speed=speed))
    with pytest.raises(ValueError, match=REFUSED):
        TrainState(load_flux(flux_file, format="int8"), job)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", KINDS)
def test_a_card_gives_what_the_cpu_gives(format: str, dtype: torch.dtype) -> None:
    card = torch.device("cuda")
    if not has_products("8bit", card, format):
        pytest.skip(f"this card has no products in 8 bits of {format}")
    x, weight = numbers(TOKENS, COLUMNS, seed=1).to(dtype), packed(format)
    wanted = both_ways(weight, x)
    weight.to(card)
    leaf = x.to(card).requires_grad_()
    y = eight_bit_linear(weight, leaf)
    y.backward(numbers(TOKENS, ROWS, seed=3).to(card, dtype))
    assert error(y.cpu(), wanted[0]) < 0.004  # 2^-8, half a unit of bf16
    assert error(leaf.grad.cpu(), wanted[1]) < 0.004  # pyright: ignore
