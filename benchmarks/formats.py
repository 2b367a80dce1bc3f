"""What each weight format takes and loses, beside optimum-quanto and torchao where installed.

    python -P benchmarks/formats.py [--out benchmarks/results/formats.json]

Writes the JSON and the table of docs/formats.md. The error is the norm of the difference over the
norm of the weights, in float32. Exits with 1 if another package's error is smaller than ours.

quanto and torchao are no requirement of the pack. They are measured from an environment of their
own, with no other package: where transformers is installed, quanto imports it and its models too.

    python -m venv DIR
    DIR/bin/python -m pip install torch safetensors bitsandbytes optimum-quanto torchao

quanto compiles a part of itself at its first int4 matrix, for which it needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "formats.md"
SHAPE = (512, 1024)
LARGE = (3072, 3072)
"""A matrix of FLUX.1, for the times."""

RoundTrip = Callable[[Tensor], Tensor]


sys.path.append(str(ROOT / "scripts"))

from pack import load_pack  # noqa: E402

load_pack()

from atelier.trainers.formats import FORMATS  # noqa: E402
from atelier.trainers.packed_weight import PackedWeight  # noqa: E402


def sample_weights() -> dict[str, list[Tensor]]:
    """Matrices in bf16: Gaussian, Student's t with 3 degrees of freedom, and the nano model's."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(SHAPE, generator=generator) for _ in range(4)]
    heavy = normal[0] / (sum(part.square() for part in normal[1:]) / 3).sqrt()
    nano = load_file(ROOT / "assets/nano/nano-flux.safetensors")
    blocks = [
        tensor
        for name, tensor in nano.items()
        if tensor.ndim == 2 and name.startswith(("double_blocks.", "single_blocks."))
    ]
    return {"gaussian": [normal[0].bfloat16()], "heavy": [heavy.bfloat16()], "nano": blocks}


def errors(round_trip: RoundTrip, weights: dict[str, list[Tensor]]) -> dict[str, float]:
    result = {}
    for name, tensors in weights.items():
        lost = sum(float((round_trip(t).float() - t.float()).square().sum()) for t in tensors)
        whole = sum(float(t.float().square().sum()) for t in tensors)
        result[name] = round((lost / whole) ** 0.5, 5)
    return result


def measure_ours(format: str, weights: dict[str, list[Tensor]]) -> dict[str, float]:
    large = torch.randn(LARGE, generator=torch.Generator().manual_seed(0)).bfloat16()
    PackedWeight.pack(large[:64], format).dequantize(torch.bfloat16)  # warm-up
    began = time.perf_counter()
    packed = PackedWeight.pack(large, format)
    packed_at = time.perf_counter()
    packed.dequantize(torch.bfloat16)
    ended = time.perf_counter()
    return {
        "bits": round(packed.num_bytes * 8 / large.numel(), 3),
        **errors(lambda t: PackedWeight.pack(t, format).dequantize(torch.float32), weights),
        "pack_s": round(packed_at - began, 3),
        "unpack_s": round(ended - packed_at, 3),
    }


def quanto_round_trips() -> dict[str, RoundTrip]:
    """Their quantizers for weights; MaxOptimizer is what `quantize` takes."""
    from optimum import quanto

    def in_groups(bits: int, group: int, optimizer) -> RoundTrip:
        def round_trip(weights: Tensor) -> Tensor:
            kind = quanto.qtypes[f"qint{bits}"]
            scale, shift = optimizer(weights, kind, 0, group)
            settings = {"scale": scale, "shift": shift, "group_size": group}
            return quanto.quantize_weight(weights, qtype=kind, axis=0, **settings).dequantize()

        return round_trip

    def in_rows(name: str) -> RoundTrip:
        kind = quanto.qtypes[name]

        def round_trip(weights: Tensor) -> Tensor:
            scale = quanto.AbsmaxOptimizer()(weights, kind, 0)
            return quanto.quantize_weight(weights, qtype=kind, axis=0, scale=scale).dequantize()

        return round_trip

    found = {"fp8": in_rows("qfloat8_e4m3fn"), "int8": in_rows("qint8")}
    for format, bits in (("int4", 4), ("int2", 2)):
        group = FORMATS[format].group
        found[format] = in_groups(bits, group, quanto.MaxOptimizer())
        found[f"{format}, HQQ"] = in_groups(bits, group, quanto.HqqOptimizer())
    return found


def torchao_round_trips() -> dict[str, RoundTrip]:
    """Their weight-only quantization of a Linear."""
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    def with_settings(settings) -> RoundTrip:
        def round_trip(weights: Tensor) -> Tensor:
            linear = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
            linear.weight = nn.Parameter(weights.clone(), requires_grad=False)
            quantization.quantize_(linear, settings)
            return linear.weight.dequantize()  # pyright: ignore

        return round_trip

    found = {
        "fp8": with_settings(quantization.Float8WeightOnlyConfig()),
        "int8": with_settings(quantization.Int8WeightOnlyConfig()),
    }
    for format, dtype in (("int4", torch.int4), ("int2", torch.int2)):
        settings = quantization.IntxWeightOnlyConfig(
            weight_dtype=dtype,
            granularity=PerGroup(FORMATS[format].group),
            mapping_type=MappingType.ASYMMETRIC,
        )
        found[format] = with_settings(settings)
    return found


OTHERS = {"optimum-quanto": quanto_round_trips, "torchao": torchao_round_trips}


def measure_others(weights: dict[str, list[Tensor]]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for package, round_trips in OTHERS.items():
        try:
            trips = round_trips()
        except ImportError:
            sys.stdout.write(f"{package} is not installed: left out\n")
            continue
        found[package] = {name: errors(trip, weights) for name, trip in trips.items()}
        found[package]["version"] = version(package)
    return found


def smaller_errors(result: dict) -> list[str]:
    """Where another package loses less than our format of the same name and group size."""
    found = []
    for package, rows in result["others"].items():
        for name, row in rows.items():
            if name == "version":
                continue
            ours = result["formats"][name.split(",")[0]]
            found += [f"{name}, {on}: {package}" for on in row if row[on] < ours[on]]
    return found


def table(result: dict) -> str:
    """The measured part of docs/formats.md."""
    lines = ["| Format | Bits per weight | Gaussian | Heavy tails | Nano model | Pack, unpack |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in result["formats"].items():
        times = f"{row['pack_s']:.2f} s, {row['unpack_s']:.2f} s"
        lines.append(f"| {name} | {row['bits']:.2f} | {percents(row)} | {times} |")
    for package, rows in result["others"].items():
        for name, row in rows.items():
            if name != "version":
                lines.append(f"| {name}: {package} {rows['version']} | | {percents(row)} | |")
    return "\n".join(lines)


def percents(row: dict[str, float]) -> str:
    return " | ".join(f"{100 * row[name]:.2f} %" for name in ("gaussian", "heavy", "nano"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/formats.json")
    arguments = parser.parse_args()
    weights = sample_weights()
    result = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "formats": {format: measure_ours(format, weights) for format in FORMATS},
        "others": measure_others(weights),
    }
    sys.stdout.write(table(result) + "\n")
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"(?ms)^\| Format .*?(?=\n\n)", lambda _: table(result), page)
    PAGE.write_text(page, encoding="utf-8", newline="\n")
    smaller = smaller_errors(result)
    for line in smaller:
        sys.stdout.write(f"smaller than ours: {line}\n")
    return 1 if smaller else 0


if __name__ == "__main__":
    sys.exit(main())
