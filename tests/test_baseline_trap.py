"""Why the benchmark's baseline sets `support_avx512bf16_for_cpu = False` on every `Linear4bit`.

On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weight for speed the first time it is
evaluated without gradients. From then on the layer is not differentiable: it raises, or gives its
input no gradient with only a warning. Our own packed weights never go that way.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from atelier.trainers.packed_weight import PackedWeight
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

HAS_AVX512_BF16 = getattr(functional, "has_avx512bf16", lambda: False)()


def matrix() -> torch.Tensor:
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


def layer() -> Linear4bit:
    made = Linear4bit(128, 128, bias=False, quant_type="nf4", compress_statistics=False)
    made.load_state_dict({"weight": matrix().float()})
    return made.to("cpu").eval()  # the move quantizes


def gradient_after_an_evaluation(function) -> torch.Tensor | None:
    with torch.no_grad():
        function(torch.ones(4, 128, dtype=torch.bfloat16))
    x = torch.ones(4, 128, dtype=torch.bfloat16, requires_grad=True)
    function(x).sum().backward()
    return x.grad


@pytest.fixture
def expected() -> torch.Tensor:
    data, state = functional.quantize_4bit(matrix(), blocksize=64, quant_type="nf4")
    dense = functional.dequantize_4bit(data, state)
    return torch.ones(4, 128, dtype=torch.bfloat16) @ dense


@pytest.mark.skipif(not HAS_AVX512_BF16, reason="this CPU has no AVX512-BF16")
def test_a_linear4bit_is_not_differentiable_after_an_evaluation(expected: torch.Tensor) -> None:
    gradient = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            gradient = gradient_after_an_evaluation(layer())
        except (RuntimeError, NotImplementedError, AssertionError):
            return
    assert gradient is None or not torch.allclose(gradient, expected, rtol=0.02, atol=0.05)


def test_a_linear4bit_without_the_repacking_is(expected: torch.Tensor) -> None:
    baseline = layer()
    baseline.support_avx512bf16_for_cpu = False
    gradient = gradient_after_an_evaluation(baseline)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.05)


def test_our_packed_weight_is(expected: torch.Tensor) -> None:
    gradient = gradient_after_an_evaluation(PackedWeight.pack(matrix(), "nf4").linear)
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.05)
