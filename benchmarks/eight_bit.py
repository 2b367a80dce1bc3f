"""What products in 8 bits lose, and how much faster they are than unpacked ones.

    python -P benchmarks/eight_bit.py [--runs 21] [--out benchmarks/results/eight_bit.json]

Errors are those of the product and of the gradient of its input, with one matrix of FLUX.1's width,
and of the velocity and the LoRA's gradient of the nano model; each against the same packed weights
unpacked, in float32, as the norm of the difference over the norm. `outliers` are Gaussian numbers
with every 512th channel 30 times as large, which is how activations of transformers look.

Times are of one product and its gradient in bf16, 4,608 tokens (1024x1024 pixels, 512 of text): the
median of the runs, both ways in turns, with the most memory beside weights and inputs. They need a
CUDA card that has such products; elsewhere the file says so in their place.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "assets" / "nano" / "nano-flux.safetensors"
sys.path.append(str(ROOT / "scripts"))

from pack import load_pack  # noqa: E402

load_pack()

from atelier.trainers.adapters import attach_lora  # noqa: E402
from atelier.trainers.devices import default_device  # noqa: E402
from atelier.trainers.eight_bit import eight_bit_linear, has_products  # noqa: E402
from atelier.trainers.flux import (  # noqa: E402
    build_transformer,
    multiply_in_8_bits,
    velocity,
)
from atelier.trainers.load import LoadedFlux, load_flux  # noqa: E402
from atelier.trainers.lora_settings import LoraSettings  # noqa: E402
from atelier.trainers.packed_weight import Matrix, PackedWeight  # noqa: E402

FORMATS = ("int8", "fp8", "bf16")
WIDTH, TOKENS = 3072, 4608
SHAPES = {"attention": (WIDTH, WIDTH), "mlp": (4 * WIDTH, WIDTH), "linear2": (WIDTH, 5 * WIDTH)}
"""Matrices [out, in] of a step."""
WAYS: dict[str, Callable[..., Tensor]] = {"dequantized": Matrix.linear, "8bit": eight_bit_linear}
NO_CARD = "not measured: needs a CUDA card that multiplies in 8 bits"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(found: Tensor, wanted: Tensor) -> float:
    return round(float((found - wanted).norm() / wanted.norm()), 5)


def errors_of_a_matrix(format: str, x: Tensor) -> dict[str, float]:
    weight = PackedWeight.pack(random(WIDTH, WIDTH, seed=0).bfloat16(), format)
    found = {}
    for way, product in WAYS.items():
        leaf = x.clone().requires_grad_()
        y = product(weight, leaf)
        y.backward(random(*y.shape, seed=2))
        found[way] = y.detach(), leaf.grad
    (wanted, gradient), (y, other) = found["dequantized"], found["8bit"]
    return {"product": error(y, wanted), "gradient": error(other, gradient)}


def errors_of_nano(format: str) -> dict[str, float]:
    base = load_flux(NANO, format=format)
    wanted, found = (velocity_and_gradient(base, is_8_bit=is_on) for is_on in (False, True))
    return {
        "velocity": error(found[0], wanted[0]),
        "gradient": error(found[1], wanted[1]),
        "cosine of the gradients": round(float(F.cosine_similarity(found[1], wanted[1], 0)), 5),
    }


def velocity_and_gradient(base: LoadedFlux, *, is_8_bit: bool) -> tuple[Tensor, Tensor]:
    """Of a LoRA on all layers that is not at its start, whose `down` has no gradient."""
    transformer = build_transformer(base.store, base.config, torch.float32).train()
    if is_8_bit:
        multiply_in_8_bits(transformer)
    lora = attach_lora(transformer, LoraSettings(targets="all+ffs"), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    latents, noise = random(2, 16, 32, 32, seed=2), random(2, 16, 32, 32, seed=3)
    prediction = velocity(
        transformer,
        (latents + noise) / 2,
        sigma=torch.full((2,), 0.5),
        prompt_embeds=random(2, 77, base.config.context_dim, seed=4),
        pooled=random(2, base.config.vector_dim, seed=5),
        guidance=1.0,
    )
    (prediction - (noise - latents)).square().mean().backward()
    gradients = [p.grad.flatten() for p in lora.parameters.values() if p.grad is not None]
    return prediction.detach(), torch.cat(gradients)


def times(device: torch.device, format: str, runs: int) -> dict[str, Any]:
    return {name: times_of(shape, device, format, runs) for name, shape in SHAPES.items()}


def times_of(
    shape: tuple[int, int], device: torch.device, format: str, runs: int
) -> dict[str, Any]:
    weight = PackedWeight.pack(random(*shape, seed=0).bfloat16().to(device), format)
    x = random(TOKENS, shape[1], seed=1).to(device, torch.bfloat16).requires_grad_()
    gradient = random(TOKENS, shape[0], seed=2).to(device, torch.bfloat16)
    milliseconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks = {}
    for run in range(runs + 3):
        for way, product in WAYS.items():
            x.grad = None
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            product(weight, x).backward(gradient)
            end.record()
            torch.cuda.synchronize(device)
            peaks[way] = torch.cuda.max_memory_allocated(device) - before
            if run >= 3:  # the first ones choose kernels
                milliseconds[way].append(start.elapsed_time(end))
    medians = {way: statistics.median(values) for way, values in milliseconds.items()}
    return {
        "ms": {way: round(value, 3) for way, value in medians.items()},
        "times as fast": round(medians["dequantized"] / medians["8bit"], 2),
        "peak_mb": {way: round(peak / 1e6, 1) for way, peak in peaks.items()},
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/eight_bit.json")
    options = parser.parse_args(arguments)
    device = default_device()
    gaussian = random(256, WIDTH, seed=1)
    outliers = gaussian.clone()
    outliers[:, ::512] *= 30
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "errors": {
            format: {
                "gaussian": errors_of_a_matrix(format, gaussian),
                "outliers": errors_of_a_matrix(format, outliers),
                "nano": errors_of_nano(format),
            }
            for format in FORMATS
        },
        "times": {
            format: times(device, format, options.runs)
            if has_products("8bit", device, format)
            else NO_CARD
            for format in FORMATS
        },
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    main()
